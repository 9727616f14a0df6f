"""The Renderer: images against analysis, batches, empty and full volumes, jitter, chunks."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor

import sdi_fast.render
from sdi_fast import reference
from sdi_fast.camera import orbit_cameras, sample_cameras, select_views
from sdi_fast.config import CameraConfig, FieldConfig, LossConfig, RenderConfig
from sdi_fast.field import EnvironmentBackground, NeRFField
from sdi_fast.losses import render_losses
from sdi_fast.occupancy import OccupancyGrid
from sdi_fast.render import Renderer, choose_shading
from sdi_fast.types import Camera, RaySums, RenderOutput, SDIFastError

FIELD = FieldConfig(
    n_levels=4,
    log2_hashmap_size=10,
    base_resolution=5,
    per_level_scale=1.7,
    start_level=4,
    hidden=16,
)
RENDER = RenderConfig(n_samples_per_ray=96)
IMAGES = [f.name for f in dataclasses.fields(RenderOutput) if f.name != "n_samples"]


def test_choose_shading() -> None:
    draws = torch.Generator().manual_seed(0)
    config = RenderConfig()
    assert {choose_shading(999, config, draws) for _ in range(50)} == {"albedo"}
    n = 4000
    picks = [choose_shading(1000, config, draws) for _ in range(n)]
    for name, share in (("albedo", 0.7), ("textureless", 0.225), ("diffuse", 0.075)):
        spread = 4 * math.sqrt(share * (1 - share) / n)
        assert picks.count(name) / n == pytest.approx(share, abs=spread)
    with pytest.raises(SDIFastError, match="albedo_prob"):
        choose_shading(0, dataclasses.replace(config, albedo_prob=-0.1), draws)


@dataclasses.dataclass
class Scene:
    field: NeRFField
    background: EnvironmentBackground
    occupancy: OccupancyGrid

    def render(self, camera: Camera, **options: object) -> RenderOutput:
        arguments = {"step": 0, "shading": "diffuse", **options}
        step, shading = arguments.pop("step"), arguments.pop("shading")
        renderer = Renderer(FIELD, RENDER, "reference")
        return renderer.render(
            self.field, self.background, self.occupancy, camera, step, shading, **arguments
        )

    def parameters(self) -> list[Tensor]:
        return [*self.field.parameters(), *self.background.parameters()]


@pytest.fixture
def scene() -> Scene:
    """A blob with some texture, its grid up to date."""
    draws = torch.Generator().manual_seed(0)
    nerf = NeRFField(FIELD, generator=draws, backend="reference")
    with torch.no_grad():
        nerf.table.normal_(std=0.3, generator=draws)
    sky = EnvironmentBackground(generator=draws, backend="reference")
    grid = OccupancyGrid(RENDER, radius=2.0)
    for step in range(0, 64, 16):
        grid.update(step, lambda x: nerf.density(x, 0), RENDER, draws)
    return Scene(nerf, sky, grid)


def orbit(n: int = 1, height: int = 12, width: int = 12, **options: float) -> Camera:
    return orbit_cameras(CameraConfig(height=height, width=width), n, **options)


def jitter(generator: torch.Generator) -> Tensor:
    """Of one view of `orbit`."""
    return Renderer(FIELD, RENDER).draw_jitter(144, generator)


def test_a_ball(scene: Scene) -> None:
    """The untextured blob: silhouette, depth, normal and light from in front."""
    with torch.no_grad():
        for tensor in scene.field.parameters():
            tensor.zero_()
    scene.occupancy.binary.fill_(True)
    scene.occupancy.occs.fill_(1.0)
    camera = orbit(1, 33, 33, elevation_deg=0.0, azimuth_offset_deg=90.0)
    out = scene.render(camera, shading="diffuse")
    middle = (0, 16, 16)
    assert out.opacity[middle] > 0.99
    assert not out.opacity[0, 0, 0]
    # softplus(10 (1 - r / .5)) = 10 near r = 0; half of the light is absorbed about r = 0.35
    assert out.depth[middle].item() == pytest.approx(2.0 - 0.35, abs=0.1)
    normal = out.comp_normal[middle] * 2 / out.opacity[middle] - 1
    assert torch.allclose(normal, torch.tensor([0.0, 1.0, 0.0]), atol=1e-3)
    # half of the optical depth lies behind the centre and gets the ambient light alone
    transparency = 1 - out.opacity[middle].item()
    behind = math.sqrt(transparency) - transparency
    lit = 0.5 * (out.opacity[middle].item() - 0.9 * behind)
    assert out.comp_rgb_fg[middle].tolist() == pytest.approx([lit] * 3, abs=0.01)  # dt is 0.07
    flat = scene.render(camera, shading="albedo")
    assert torch.allclose(flat.comp_rgb_fg, 0.5 * flat.opacity.expand(1, 33, 33, 3), atol=1e-6)
    assert out.orient[middle].item() == pytest.approx(behind, abs=0.02)  # what faces away there
    assert torch.allclose(out.opacity, out.opacity.flip(2), atol=1e-3)  # left-right symmetric
    assert torch.allclose(out.opacity, out.opacity.flip(1), atol=1e-3)


def test_blending_identities(scene: Scene) -> None:
    out = scene.render(orbit(2))
    blended = out.comp_rgb_fg + (1 - out.opacity) * out.comp_rgb_bg
    assert torch.allclose(out.comp_rgb, blended)
    assert 0 <= out.comp_rgb.min() and out.comp_rgb.max() <= 1
    assert out.opacity.min() == 0.0 and out.opacity.max() > 0.9
    decoded = 2 * out.comp_normal - out.opacity
    solid = out.opacity[..., 0] > 0
    assert torch.allclose(decoded.norm(dim=-1)[solid], out.opacity[..., 0][solid], atol=1e-4)


def test_batch_of_two_is_two_batches_of_one(scene: Scene) -> None:
    camera = sample_cameras(
        CameraConfig(height=9, width=13, batch_size=2), torch.Generator().manual_seed(1), "cpu"
    )
    together = scene.render(camera)
    apart = [scene.render(select_views(camera, [i])) for i in range(2)]
    assert together.n_samples == sum(o.n_samples for o in apart)
    for name in IMAGES:
        both = torch.cat([getattr(o, name) for o in apart])
        # the running sum of optical depth starts elsewhere
        assert relative_error(getattr(together, name), both) < 1e-5, name

    def grads(outputs: list[RenderOutput]) -> list[Tensor]:
        total = sum(o.comp_rgb.sum() + o.comp_normal.sum() + o.depth.sum() for o in outputs)
        return list(torch.autograd.grad(total, scene.parameters()))

    for a, b in zip(grads([together]), grads(apart), strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("shading", ["albedo", "textureless", "diffuse"])
def test_empty_volume(scene: Scene, shading: str) -> None:
    """methods.md G10: background only, all losses and gradients finite."""
    scene.occupancy.binary.fill_(False)
    camera = orbit(2)
    out = scene.render(camera, shading=shading)
    assert out.n_samples == 0
    assert torch.equal(out.comp_rgb, out.comp_rgb_bg)
    for name in ("opacity", "depth", "z_variance", "comp_normal", "orient", "comp_rgb_fg"):
        assert not getattr(out, name).any(), name
    for frame in ("world", "camera"):
        losses = render_losses(out, camera, LossConfig(convex_frame=frame))
        total = sum(losses.values()) + out.comp_rgb.sum()
        assert total.isfinite()
        for grad in torch.autograd.grad(
            total, scene.parameters(), allow_unused=True, retain_graph=True
        ):
            assert grad is None or grad.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (1, 16), (33, 31)])
def test_odd_sizes(scene: Scene, height: int, width: int) -> None:
    out = scene.render(orbit(1, height, width))
    assert out.comp_rgb.shape == out.comp_normal.shape == (1, height, width, 3)
    assert out.opacity.shape == out.depth.shape == (1, height, width, 1)
    assert out.comp_rgb.isfinite().all()


def test_full_grid_changes_nothing_that_is_seen(scene: Scene) -> None:
    """Occupancy only skips: what it skips is too thin to pass the alpha threshold."""
    scene.occupancy.occs.fill_(1.0)  # alpha threshold .01, the same for both
    sparse = scene.render(orbit())
    assert scene.occupancy.binary.float().mean() < 0.2
    scene.occupancy.binary.fill_(True)
    full = scene.render(orbit())
    # cells were judged by four random points, so a little of the rim is missed
    assert relative_error(sparse.opacity, full.opacity) < 0.02
    assert full.n_samples >= sparse.n_samples


def test_jitter(scene: Scene) -> None:
    camera = orbit()
    plain = scene.render(camera)
    a, b, c = (
        scene.render(camera, jitter=jitter(torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    )
    assert torch.equal(a.comp_rgb, b.comp_rgb)
    assert not torch.equal(a.comp_rgb, c.comp_rgb)
    # a different lattice of the same integral
    assert 0 < relative_error(a.depth, plain.depth) < 0.05


def test_deterministic_mode_repeats_every_bit(scene: Scene) -> None:
    def run() -> list[Tensor]:
        grid = OccupancyGrid(RENDER, radius=2.0, backend="reference")
        draws = torch.Generator().manual_seed(0)
        grid.update(256, lambda x: scene.field.density(x, 0), RENDER, draws)
        out = Scene(scene.field, scene.background, grid).render(orbit(), jitter=jitter(draws))
        total = out.comp_rgb.square().sum() + out.comp_normal.sum() + out.z_variance.sum()
        return [grid.occs, total, *torch.autograd.grad(total, scene.parameters())]

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # raises where an operation has no such version
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_fused_renderer_hears_of_determinism(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    heard = []

    def render_views(*args: Any, **options: Any) -> RaySums:
        heard.append(options.pop("deterministic"))
        return reference.render_views(*args, alpha_bound=options["alpha_bound"])

    monkeypatch.setattr(sdi_fast.render, "can_fuse", lambda *_: True)
    monkeypatch.setattr(sdi_fast.render, "render_views", render_views)
    renderer = Renderer(FIELD, RENDER, deterministic=deterministic)
    renderer.render(scene.field, scene.background, scene.occupancy, orbit(), 0, "albedo")
    assert heard == [deterministic]


@pytest.mark.parametrize(
    ("backend", "has_cuda", "is_refused"),
    [
        ("cuda", True, True),
        ("auto", True, True),
        ("auto", False, False),
        ("reference", True, False),
    ],
)
def test_atomics_are_refused_where_gradients_have_to_repeat(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    has_cuda: bool,
    is_refused: bool,
) -> None:
    monkeypatch.setattr(sdi_fast.render, "has_cuda", lambda: has_cuda)
    config = dataclasses.replace(RENDER, precision="fp32")
    like: Any = types.SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.float32)
    assert not Renderer(FIELD, config, backend).is_fused(scene.field, like)
    renderer = Renderer(FIELD, config, backend, deterministic=True)
    if is_refused:
        with pytest.raises(SDIFastError, match="deterministic: the single CUDA ops"):
            renderer.is_fused(scene.field, like)
    else:
        assert not renderer.is_fused(scene.field, like)


def test_chunks_do_not_show(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        whole = scene.render(orbit())
        monkeypatch.setattr(sdi_fast.render, "CHUNK_SAMPLES", 97)
        chunked = scene.render(orbit())
    assert whole.n_samples == chunked.n_samples > 97
    for name in IMAGES:
        assert relative_error(getattr(chunked, name), getattr(whole, name)) < 1e-5, name


def test_active_levels_follow_the_step(scene: Scene) -> None:
    config = dataclasses.replace(FIELD, start_level=1, start_step=0, update_steps=10)
    coarse = NeRFField(config, backend="reference")
    coarse.load_state_dict(scene.field.state_dict())
    both = Scene(coarse, scene.background, scene.occupancy)
    first, last = both.render(orbit(), step=0), both.render(orbit(), step=30)
    assert not torch.equal(first.comp_rgb, last.comp_rgb)
    assert torch.equal(last.comp_rgb, scene.render(orbit()).comp_rgb)


def test_bad_arguments_are_named(scene: Scene) -> None:
    with pytest.raises(SDIFastError, match="shading"):
        scene.render(orbit(), shading="shiny")
    with pytest.raises(SDIFastError, match="n_samples_per_ray"):
        Renderer(FIELD, dataclasses.replace(RENDER, n_samples_per_ray=0))
    with pytest.raises(SDIFastError, match="backend"):
        Renderer(FIELD, RENDER, "opencl").render(
            scene.field, scene.background, scene.occupancy, orbit(), 0, "albedo",
        )  # fmt: skip
