"""The losses on images, their schedules and the empty volume (methods.md D, Losses; G6, G10)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdi_fast.camera import orbit_cameras
from sdi_fast.config import CameraConfig, LossConfig
from sdi_fast.losses import loss_weights, render_losses
from sdi_fast.reference import convexity_loss
from sdi_fast.reference.convexity import camera_frame_normals
from sdi_fast.types import Camera, RenderOutput, SDIFastError

WORLD, CAMERA = LossConfig(), LossConfig(convex_frame="camera")


def images(
    opacity: Tensor,  # [B, H, W]
    *,
    normal: Tensor | None = None,  # [B, H, W, 3] unit, world frame
    orient: Tensor | None = None,  # [B, H, W]
    z_variance: Tensor | None = None,  # [B, H, W]
) -> RenderOutput:
    zeros = torch.zeros_like(opacity)[..., None]
    normal = zeros.expand(*opacity.shape, 3) if normal is None else normal
    return RenderOutput(
        comp_rgb=zeros.expand(*opacity.shape, 3),
        comp_rgb_fg=zeros.expand(*opacity.shape, 3),
        comp_rgb_bg=zeros.expand(*opacity.shape, 3),
        opacity=opacity[..., None],
        depth=zeros,
        z_variance=zeros if z_variance is None else z_variance[..., None],
        comp_normal=opacity[..., None] * (normal + 1.0) / 2.0,
        orient=zeros if orient is None else orient[..., None],
        n_samples=0,
    )


def view(azimuth: float = 0.0, elevation: float = 0.0, size: int = 64) -> Camera:
    return orbit_cameras(
        CameraConfig(height=size, width=size),
        1,
        elevation_deg=elevation,
        azimuth_offset_deg=azimuth,
    )


def bump(camera: Camera, *, hollow: bool = False, stretch: tuple[float, float] = (1.0, 1.0)):
    """A ball, or the inside of one, filling the image, seen orthographically.

    `stretch` 0 along x or y makes it a cylinder that does not curve that way.
    """
    n = camera.height
    coordinate = (torch.arange(n) + 0.5) / n * 2 - 1
    y, x = torch.meshgrid(-coordinate, coordinate, indexing="ij")
    x, y = 0.7 * x * stretch[0], 0.7 * y * stretch[1]
    z = (1 - x * x - y * y).sqrt()
    sign = -1.0 if hollow else 1.0
    local = torch.stack([sign * x, sign * y, z], dim=-1)  # camera frame
    normal = local @ camera.c2w[0, :, :3].T
    return images(torch.ones(1, n, n), normal=normal[None])


def convexity(output: RenderOutput, camera: Camera, config: LossConfig) -> float:
    return render_losses(output, camera, config)["convex"].item()


def test_values_by_hand() -> None:
    output = images(
        torch.tensor([[[0.0, 0.4, 0.8, 1.0]]]),
        orient=torch.tensor([[[0.0, 0.3, 0.6, 0.0]]]),
        z_variance=torch.tensor([[[0.0, 0.0, 0.5, 0.25]]]),
    )
    losses = render_losses(output, view(), WORLD)
    assert losses["orient"].item() == pytest.approx(0.9 / 3)  # three pixels with O > 0
    assert losses["z_variance"].item() == pytest.approx(0.75 / 2)  # two with O > 0.5
    sparsity = sum(math.sqrt(o * o + 0.01) for o in (0.0, 0.4, 0.8, 1.0)) / 4
    assert losses["sparsity"].item() == pytest.approx(sparsity)

    def entropy(p: float) -> float:
        return -(p * math.log(p) + (1 - p) * math.log(1 - p))

    opaque = sum(entropy(p) for p in (0.001, 0.4, 0.8, 0.999)) / 4
    assert losses["opaque"].item() == pytest.approx(opaque, rel=1e-5)
    assert all(value.shape == () for value in losses.values())


def test_empty_volume_is_zero_and_finite() -> None:
    opacity = torch.zeros(2, 4, 4, requires_grad=True)
    zeros = opacity * 0.0
    losses = render_losses(
        images(opacity, orient=zeros, z_variance=zeros), orbit_cameras(CameraConfig(), 2), WORLD
    )
    assert losses["orient"].item() == 0.0
    assert losses["z_variance"].item() == 0.0
    assert losses["convex"].item() == 0.0
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert opacity.grad.isfinite().all()


def test_convexity_reads_the_middle_of_each_cell() -> None:
    """8 x 8 cells of 8 x 8 pixels: each is the mean of its central 2 x 2."""
    normals = torch.randn(2, 64, 64, 3, dtype=torch.float64)
    m = torch.zeros(2, 8, 8, 3, dtype=torch.float64)
    for r in range(8):
        for c in range(8):
            block = normals[:, 8 * r + 3 : 8 * r + 5, 8 * c + 3 : 8 * c + 5]
            m[:, r, c] = block.mean(dim=(1, 2))
    rightwards = torch.linalg.cross(m[:, :, :-1], m[:, :, 1:])[..., 2].mean()
    upwards = torch.linalg.cross(m[:, 1:], m[:, :-1])[..., 2].mean()
    assert convexity_loss(normals).item() == pytest.approx(-(rightwards + upwards).item())


def test_convexity_gradcheck_on_odd_sizes() -> None:
    for height, width in ((31, 33), (5, 9), (8, 8)):
        normals = torch.randn(1, height, width, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(convexity_loss, (normals,))


def test_world_convexity_is_right_in_front_and_wrong_behind() -> None:
    """methods.md G6: convex minus hollow has the right sign at azimuth 0, not at 225."""
    for azimuth, right in ((0.0, True), (225.0, False)):
        camera = view(azimuth)
        convex, hollow = bump(camera), bump(camera, hollow=True)
        difference = convexity(convex, camera, WORLD) - convexity(hollow, camera, WORLD)
        assert (difference < 0) == right


@pytest.mark.parametrize("elevation", [-40.0, 0.0, 15.0, 60.0])
@pytest.mark.parametrize("azimuth", [0.0, 90.0, 180.0, 225.0, 270.0])
def test_camera_convexity_is_right_from_everywhere(azimuth: float, elevation: float) -> None:
    camera = view(azimuth, elevation)
    values = {hollow: convexity(bump(camera, hollow=hollow), camera, CAMERA) for hollow in (0, 1)}
    reference = convexity(bump(view()), view(), CAMERA)
    assert values[0] == pytest.approx(reference, rel=1e-4)  # the same from every viewpoint
    assert values[1] == pytest.approx(-reference, rel=1e-4)
    assert reference < -0.1


def test_camera_convexity_counts_both_directions_alike() -> None:
    camera = view(40.0, 20.0)
    sideways = convexity(bump(camera, stretch=(1.0, 0.0)), camera, CAMERA)
    upwards = convexity(bump(camera, stretch=(0.0, 1.0)), camera, CAMERA)
    assert sideways == pytest.approx(upwards, rel=1e-4)
    assert sideways < -0.05
    assert convexity(bump(camera, stretch=(0.0, 0.0)), camera, CAMERA) == pytest.approx(0, abs=1e-6)


def test_camera_frame_is_a_rotation_and_decodes() -> None:
    camera = orbit_cameras(CameraConfig(), 3, azimuth_offset_deg=20.0)
    normal = F.normalize(torch.randn(3, 6, 6, 3), dim=-1)
    opacity = torch.rand(3, 6, 6, 1)
    local = camera_frame_normals(opacity * (normal + 1) / 2, opacity, camera.c2w)
    assert torch.allclose(local.norm(dim=-1, keepdim=True), opacity, atol=1e-5)
    other = F.normalize(torch.randn(3, 6, 6, 3), dim=-1)
    ones = torch.ones_like(opacity)
    a, b = (camera_frame_normals((n + 1) / 2, ones, camera.c2w) for n in (normal, other))
    crossed = camera_frame_normals((torch.linalg.cross(normal, other) + 1) / 2, ones, camera.c2w)
    assert torch.allclose(torch.linalg.cross(a, b), crossed, atol=1e-5)  # right-handed
    facing = camera_frame_normals(
        (camera.c2w[:, None, None, :, 2].expand(3, 6, 6, 3) + 1) / 2, ones, camera.c2w
    )
    assert torch.allclose(facing, torch.tensor([1.0, 0.0, 0.0]).expand_as(facing), atol=1e-5)


def test_weights_follow_their_schedules() -> None:
    start, middle, end = (loss_weights(WORLD, step) for step in (0, 1500, 20_000))
    assert start == {
        "guidance": 1.0,
        "orient": 0.1,
        "sparsity": 0.15,
        "opaque": 0.1,
        "z_variance": 1.0,
        "convex": 1.0,
    }
    assert middle["sparsity"] == pytest.approx(0.075)
    assert middle["convex"] == pytest.approx(1.0 - 0.9 * 1500 / 4000)
    assert end["sparsity"] == 0.0
    assert end["convex"] == pytest.approx(0.1)
    pieces = dataclasses.replace(WORLD, opaque=(10.0, 1.0, 2.0, 20.0, 0.0, 40.0))
    values = [loss_weights(pieces, s)["opaque"] for s in (0, 10, 15, 20, 30, 40, 99)]
    assert values == pytest.approx([1.0, 1.0, 1.5, 2.0, 1.0, 0.0, 0.0])


def test_unknown_frame_is_named() -> None:
    config = dataclasses.replace(WORLD, convex_frame="moon")
    with pytest.raises(SDIFastError, match="loss.convex_frame"):
        render_losses(bump(view()), view(), config)
