"""Cameras and rays: frames, laws and bounds (methods.md D, Camera, Rays and Light)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from sdi_fast.camera import (
    camera_to,
    orbit_cameras,
    sample_cameras,
    select_views,
    spherical_to_cartesian,
)
from sdi_fast.config import CameraConfig
from sdi_fast.reference import generate_rays
from sdi_fast.types import Camera, SDIFastError

STILL = CameraConfig(
    height=8,
    width=8,
    batch_size=4000,
    camera_perturb=0.0,
    center_perturb=0.0,
    up_perturb=0.0,
    light_position_perturb=0.0,
)
TENSORS = [f.name for f in dataclasses.fields(Camera) if f.name not in ("height", "width")]


def sample(seed: int = 0, **changes: object) -> Camera:
    config = dataclasses.replace(STILL, **changes)
    return sample_cameras(config, torch.Generator().manual_seed(seed), "cpu")


def unperturbed_position(camera: Camera) -> Tensor:
    return spherical_to_cartesian(camera.azimuth_deg, camera.elevation_deg, camera.distance)


def assert_same(a: Camera, b: Camera) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def largest_gap(values: Tensor, cdf: Tensor) -> float:
    """Kolmogorov-Smirnov distance of values, given their theoretical cdf in sorted order."""
    n = len(values)
    steps = torch.arange(n + 1, dtype=cdf.dtype) / n
    return max((cdf - steps[:-1]).abs().max().item(), (cdf - steps[1:]).abs().max().item())


# 1% point of the Kolmogorov-Smirnov distance at 4000 draws; the seeds are fixed
KS_LIMIT = 1.63 / math.sqrt(4000)


def test_c2w_is_a_right_handed_rotation_and_looks_at_the_centre() -> None:
    camera = sample(camera_perturb=0.1, center_perturb=0.2, up_perturb=0.02)
    rotation = camera.c2w[:, :, :3]
    eye = torch.eye(3).expand_as(rotation)
    assert torch.allclose(rotation.transpose(1, 2) @ rotation, eye, atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(4000), atol=1e-5)

    still = sample()
    position, look = still.c2w[:, :, 3], -still.c2w[:, :, 2]
    assert torch.allclose(look, -position / position.norm(dim=-1, keepdim=True), atol=1e-5)
    assert (still.c2w[:, 2, 0].abs() < 1e-6).all()  # right is level
    assert (still.c2w[:, 2, 1] > 0).all()  # up is up


def test_ranges_and_laws() -> None:
    camera = sample()
    for values, (low, high) in (
        (camera.azimuth_deg, STILL.azimuth_range),
        (camera.distance, STILL.distance_range),
        (torch.rad2deg(camera.fovy), STILL.fovy_range),
        (camera.light_positions.norm(dim=-1), STILL.light_distance_range),
    ):
        ordered = values.double().sort().values
        assert low - 1e-4 <= ordered[0] and ordered[-1] <= high + 1e-4
        assert largest_gap(ordered, (ordered - low) / (high - low)) < KS_LIMIT
    assert torch.allclose(camera.c2w[:, :, 3], unperturbed_position(camera), atol=1e-5)


def test_elevation_is_half_uniform_in_angle_half_in_its_sine() -> None:
    low, high = STILL.elevation_range
    elevation = sample().elevation_deg.double().sort().values
    sine = torch.sin(torch.deg2rad(elevation))
    sin_low, sin_high = math.sin(math.radians(low)), math.sin(math.radians(high))
    in_angle = (elevation - low) / (high - low)
    in_sine = (sine - sin_low) / (sin_high - sin_low)
    assert largest_gap(elevation, 0.5 * (in_angle + in_sine)) < KS_LIMIT

    wide = sample(elevation_range=(-90.0, 90.0)).elevation_deg.double().sort().values
    in_angle, in_sine = (wide + 90) / 180, (torch.sin(torch.deg2rad(wide)) + 1) / 2
    assert largest_gap(wide, 0.5 * (in_angle + in_sine)) < KS_LIMIT
    # the test can tell the laws apart
    assert largest_gap(wide, in_angle) > KS_LIMIT
    assert largest_gap(wide, in_sine) > KS_LIMIT


def test_azimuths_are_stratified_over_the_batch() -> None:
    for seed in range(5):
        camera = sample(seed, batch_size=4)
        part = torch.floor((camera.azimuth_deg + 180.0) / 90.0)
        assert part.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_perturbations() -> None:
    shaken = sample(camera_perturb=0.1)
    offset = shaken.c2w[:, :, 3] - unperturbed_position(shaken)
    assert offset.abs().max() <= 0.1 + 1e-5
    assert offset.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)  # uniform's

    # the point of the line of sight nearest to the origin is off by center_perturb in two axes
    off_centre = sample(center_perturb=0.05)
    position, look = off_centre.c2w[:, :, 3], -off_centre.c2w[:, :, 2]
    miss = position - (position * look).sum(-1, keepdim=True) * look
    assert (miss.square().sum(-1).mean() / 2).sqrt().item() == pytest.approx(0.05, rel=0.03)

    # up's sideways part is N(0, up_perturb^2) and turns the image by that over the level part
    tilted = sample(up_perturb=0.02, elevation_range=(0.0, 0.0))
    assert tilted.c2w[:, 2, 0].std().item() == pytest.approx(0.02, rel=0.05)


def test_light_is_around_the_camera_direction() -> None:
    still = sample()
    toward_light = torch.nn.functional.normalize(still.light_positions, dim=-1)
    toward_camera = torch.nn.functional.normalize(still.c2w[:, :, 3], dim=-1)
    assert torch.allclose(toward_light, toward_camera, atol=1e-5)

    # normalize(position + N(0, I)): for a camera at (2, 0, 0), the part of x > 0 is Phi(2)
    aside = sample(
        light_position_perturb=1.0,
        azimuth_range=(0.0, 0.0),
        elevation_range=(0.0, 0.0),
        distance_range=(2.0, 2.0),
    )
    in_front = (aside.light_positions[:, 0] > 0).float().mean().item()
    assert in_front == pytest.approx(0.97725, abs=4 * math.sqrt(0.97725 * 0.02275 / 4000))


def test_same_seed_same_cameras() -> None:
    assert_same(sample(3), sample(3))
    assert not torch.equal(sample(3).c2w, sample(4).c2w)


def test_orbit() -> None:
    config = CameraConfig(height=5, width=7)
    camera = orbit_cameras(config, 4)
    assert (camera.height, camera.width, camera.batch_size) == (5, 7, 4)
    assert camera.azimuth_deg.tolist() == [0.0, 90.0, -180.0, -90.0]
    level, height = 2 * math.cos(math.radians(15)), 2 * math.sin(math.radians(15))
    expected = [[level, 0, height], [0, level, height], [-level, 0, height], [0, -level, height]]
    assert torch.allclose(camera.c2w[:, :, 3], torch.tensor(expected), atol=1e-5)
    assert torch.equal(camera.light_positions, camera.c2w[:, :, 3])
    assert torch.allclose(camera.fovy, torch.tensor(math.radians(70.0)))
    # from +x, the image's right is +y
    assert torch.allclose(camera.c2w[0, :, 0], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)

    other = orbit_cameras(
        config, 3, height=2, width=4, elevation_deg=-30.0, distance=3.0, fovy_deg=40.0,
        azimuth_offset_deg=100.0,
    )  # fmt: skip
    assert torch.allclose(other.azimuth_deg, torch.tensor([100.0, -140.0, -20.0]))
    assert other.elevation_deg.tolist() == [-30.0] * 3
    assert torch.allclose(other.c2w[:, :, 3].norm(dim=-1), torch.tensor(3.0))
    assert (other.height, other.width) == (2, 4)
    assert torch.allclose(other.fovy, torch.tensor(math.radians(40.0)))


def test_select_and_move() -> None:
    camera = orbit_cameras(CameraConfig(height=2, width=2), 5)
    for indices in ([3, 1], torch.tensor([3, 1])):
        picked = select_views(camera, indices)
        assert picked.batch_size == 2
        assert torch.equal(picked.azimuth_deg, camera.azimuth_deg[[3, 1]])
        assert torch.equal(picked.c2w, camera.c2w[[3, 1]])
    assert_same(select_views(camera, slice(0, 5)), camera)
    assert camera_to(camera, "meta").c2w.device.type == "meta"


def test_rays_through_pixel_centres() -> None:
    camera = orbit_cameras(CameraConfig(height=3, width=5), 2, fovy_deg=60.0)
    origins, directions = generate_rays(camera.c2w, camera.fovy, 3, 5)
    assert origins.shape == directions.shape == (2 * 3 * 5, 3)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(30), atol=1e-6)
    grid = directions.view(2, 3, 5, 3)
    assert torch.equal(origins.view(2, 3, 5, 3)[1, 2, 3], camera.c2w[1, :, 3])

    right, up, back = camera.c2w[0, :, :3].unbind(-1)
    assert torch.allclose(grid[0, 1, 2], -back, atol=1e-6)  # the middle pixel
    focal = 0.5 * 3 / math.tan(math.radians(30.0))
    top_left = -2 / focal * right + 1 / focal * up - back
    assert torch.allclose(grid[0, 0, 0], top_left / top_left.norm(), atol=1e-6)


def test_rays_of_a_batch_are_the_rays_of_its_views() -> None:
    camera = sample(batch_size=3, camera_perturb=0.1)
    together = generate_rays(camera.c2w, camera.fovy, 4, 6)
    apart = [generate_rays(camera.c2w[i : i + 1], camera.fovy[i : i + 1], 4, 6) for i in range(3)]
    for whole, parts in zip(together, zip(*apart, strict=True), strict=True):
        assert torch.allclose(whole, torch.cat(parts), atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch_size": 0}, "camera.batch_size"),
        ({"height": 0}, "height"),
        ({"elevation_range": (-91.0, 10.0)}, "camera.elevation_range"),
        ({"elevation_range": (20.0, 10.0)}, "camera.elevation_range"),
        ({"azimuth_range": (0.0, 270.0)}, "camera.azimuth_range"),
        ({"distance_range": (0.0, 1.0)}, "camera.distance_range"),
        ({"distance_range": (1.0, math.nan)}, "camera.distance_range"),
        ({"fovy_range": (40.0, 180.0)}, "camera.fovy_range"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], name: str) -> None:
    with pytest.raises(SDIFastError, match=name):
        sample(**changes)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_views": 0},
        {"elevation_deg": 90.0},
        {"distance": 0.0},
        {"fovy_deg": 0.0},
        {"height": 0},
        {"azimuth_offset_deg": math.inf},
    ],
)
def test_bad_orbits_are_named(arguments: dict[str, float]) -> None:
    with pytest.raises(SDIFastError, match=next(iter(arguments))):
        orbit_cameras(CameraConfig(), **{"n_views": 2, **arguments})
