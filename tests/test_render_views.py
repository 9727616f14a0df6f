"""The fused renderer against its twin, and its own promises: on a GPU, or emulated on the CPU.

tests/test_emulated_cuda.py runs this file with emulated kernels where there is no GPU; without
either only the argument checks run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import random_field, relative_error
from fused_cases import DEVICE, EMULATED, ON_GPU, fused, needs_kernels, repeating, to
from half_field import half_precision
from torch import Tensor

from sdi_fast.camera import sample_cameras
from sdi_fast.config import CameraConfig
from sdi_fast.ops import _native
from sdi_fast.ops import render_views as op
from sdi_fast.reference.render_views import render_views as twin
from sdi_fast.types import (
    Camera,
    FieldParams,
    FieldSpec,
    HashGridSpec,
    MarchSpec,
    RaySums,
    SDIFastError,
)

SUMS = ("rgb", "opacity", "depth", "normal_sum", "z_variance", "orient")
PARAMS = ("table", "density_w1", "density_w2", "color_w1", "color_w2")
SHADINGS = ("albedo", "textureless", "diffuse")
GRID = HashGridSpec(8, 2, 12, 8, 1.5)  # levels 0 to 3 dense, the others hashed


@dataclasses.dataclass
class Scene:
    spec: FieldSpec
    params: FieldParams
    occupancy: Tensor
    marching: MarchSpec
    active_levels: int = 7  # one masked

    def run(
        self,
        function: Any,
        camera: Camera,
        shading: str,
        dtype: torch.dtype,
        jitter: Tensor | None = None,
        cotangents: list[Tensor] | None = None,
        grad_scale: float = 1.0,
    ) -> tuple[RaySums, list[Tensor]]:
        """The sums, and gradients of the parameters (none without cotangents)."""
        leaves = [p.to(DEVICE, dtype).requires_grad_(cotangents is not None)
                  for p in self.params.tensors()]  # fmt: skip
        result = function(
            to(camera, dtype),
            FieldParams(*leaves),
            self.spec,
            self.active_levels,
            self.occupancy.to(DEVICE),
            self.marching,
            shading,
            alpha_bound=None,
            jitter=None if jitter is None else jitter.to(DEVICE, dtype),
        )
        if cotangents is None:
            return result, []
        outputs = [getattr(result, name) for name in SUMS]
        given = [c.to(o) * grad_scale for c, o in zip(cotangents, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
        return result, [
            torch.zeros_like(p) if g is None else g / grad_scale
            for g, p in zip(grads, leaves, strict=True)
        ]


def make_scene(kind: str) -> Scene:
    """A blob as at a run's start, an opaque shell, or a random field that is far from both."""
    spec = FieldSpec(GRID, blob_scale={"blob": 10.0, "shell": 200.0, "random": 4.0}[kind])
    table_std = {"blob": 1e-4, "shell": 0.05, "random": 0.3}[kind]
    return Scene(
        spec,
        random_field(spec, table_std=table_std, seed=1),
        torch.ones(16, 16, 16, dtype=torch.bool),
        # so low that a sample which one precision keeps and another drops does not matter
        MarchSpec(0.07, near=0.02, early_stop_eps=1e-7, alpha_threshold=1e-6),
    )


def make_camera(n_views: int, height: int, width: int, seed: int = 0) -> Camera:
    draws = torch.Generator().manual_seed(seed)
    config = CameraConfig(height=height, width=width, batch_size=n_views)
    return sample_cameras(config, draws, "cpu")


def make_jitter(camera: Camera, marching: MarchSpec) -> Tensor:
    n = camera.batch_size * camera.height * camera.width
    return torch.rand(n, generator=torch.Generator().manual_seed(7)) * marching.step_size


def random_cotangents(camera: Camera) -> list[Tensor]:
    n = camera.batch_size * camera.height * camera.width
    draws = torch.Generator().manual_seed(11)
    shapes = ((n, 3), (n,), (n,), (n, 3), (n,), (n,))
    return [torch.randn(*s, generator=draws, dtype=torch.float64) for s in shapes]


@needs_kernels
@pytest.mark.parametrize(
    "size", [(1, 13, 9), (4, 5, 7)] if EMULATED else [(1, 67, 45), (4, 33, 31)]
)
@pytest.mark.parametrize("shading", SHADINGS)
@pytest.mark.parametrize("kind", ["blob", "shell", "random"])
def test_agrees_with_the_f64_twin(kind: str, shading: str, size: tuple[int, int, int]) -> None:
    """style.md 4: errors at most twice those of PyTorch at the same precision, both against f64."""
    scene, camera = make_scene(kind), make_camera(*size)
    jitter, cotangents = make_jitter(camera, scene.marching), random_cotangents(camera)
    exact, exact_grads = scene.run(twin, camera, shading, torch.float64, jitter, cotangents)
    ours, our_grads = scene.run(fused, camera, shading, torch.float32, jitter, cotangents)
    same, repeating_grads = scene.run(repeating, camera, shading, torch.float32, jitter, cotangents)
    with half_precision():
        # as GradScaler does, lest cotangents vanish in f16
        half, half_grads = scene.run(
            twin, camera, shading, torch.float32, jitter, cotangents, grad_scale=256.0
        )
    assert exact.counts[0] > 100
    for name in SUMS:
        error = relative_error(getattr(ours, name), getattr(exact, name))
        allowed = 2.0 * relative_error(getattr(half, name), getattr(exact, name))
        assert error <= allowed + 2e-6, name  # f32 positions: 1e-7 times slopes of about 20
        assert torch.equal(getattr(same, name), getattr(ours, name))
    for name, *both, e, h in zip(
        PARAMS, our_grads, repeating_grads, exact_grads, half_grads, strict=True
    ):
        allowed = 2.0 * relative_error(h, e)
        for a in both:
            assert relative_error(a, e) <= allowed + 2e-6, f"grad {name}"
            if a.norm() > 0:
                assert relative_error(a, e) < 0.1, f"grad {name}"  # nor may both be wrong
        # both sum the same numbers: f32's rounding, once an addition
        assert relative_error(both[1], both[0]) < 2e-6, f"grad {name}"


@needs_kernels
def test_takes_the_twins_samples() -> None:
    """A grid with holes, rays that start outside, jitter: the same steps as the f32 twin's."""
    scene, camera = make_scene("random"), make_camera(2, 11, 13)
    draws = torch.Generator().manual_seed(3)
    scene.occupancy = torch.rand(16, 16, 16, generator=draws) > 0.7
    scene.marching = dataclasses.replace(scene.marching, alpha_threshold=1e-2)
    far = dataclasses.replace(camera, c2w=camera.c2w.clone())
    far.c2w[0, :, 3] *= 3.0
    jitter = make_jitter(far, scene.marching)
    ours, _ = scene.run(fused, far, "albedo", torch.float32, jitter)
    expected, _ = scene.run(twin, far, "albedo", torch.float32, jitter)
    kept, tried = ours.counts.tolist()
    # rays are made with another rounding, so that a midpoint on a cell's face may change sides;
    # alphas at the threshold may too
    assert abs(tried - int(expected.counts[1])) <= max(2, 1e-3 * tried)
    assert abs(kept - int(expected.counts[0])) <= max(2, 1e-3 * kept)
    assert tried > 1000 and 0 < kept < tried
    for name in SUMS:
        # one sample of a ray of ten, of some hundred rays: 1e-2; anything systematic is far above
        assert relative_error(getattr(ours, name), getattr(expected, name)) < 2e-2, name


@needs_kernels
def test_alpha_bound_lowers_the_threshold() -> None:
    scene, camera = make_scene("blob"), make_camera(1, 9, 8)
    scene.marching = dataclasses.replace(scene.marching, alpha_threshold=0.5)

    def kept(bound: float | None) -> int:
        def with_bound(*args: Any, alpha_bound: Tensor | None, jitter: Tensor | None) -> RaySums:
            given = None if bound is None else torch.tensor(bound, device=DEVICE)
            return fused(*args, alpha_bound=given, jitter=jitter)

        return int(scene.run(with_bound, camera, "albedo", torch.float32)[0].counts[0])

    assert kept(None) == kept(0.9) < kept(0.1) < kept(1e-4)


@needs_kernels
def test_empty_grid_and_no_rays() -> None:
    scene = make_scene("random")
    scene.occupancy = torch.zeros(16, 16, 16, dtype=torch.bool)
    camera = make_camera(2, 5, 9)
    sums, grads = scene.run(
        fused, camera, "diffuse", torch.float32, None, random_cotangents(camera)
    )
    assert sums.counts.tolist() == [0, 0]
    assert all(not getattr(sums, name).any() for name in SUMS)
    assert all(not g.any() for g in grads)
    for size in ((1, 0, 8), (1, 8, 0)):
        none = dataclasses.replace(make_camera(1, 1, 1), height=size[1], width=size[2])
        for function in (fused, repeating):
            sums, grads = scene.run(
                function, none, "albedo", torch.float32, None, random_cotangents(none)
            )
            assert sums.rgb.shape == (0, 3) and sums.counts.tolist() == [0, 0]
            assert all(not g.any() for g in grads)


@needs_kernels
def test_masked_levels_get_no_gradient() -> None:
    scene, camera = make_scene("random"), make_camera(1, 8, 8)
    scene.active_levels = 3
    for function in (fused, repeating):
        _, (table, w1, _, v1, _) = scene.run(
            function, camera, "diffuse", torch.float32, None, random_cotangents(camera)
        )
        first = scene.spec.grid.level_offsets[3] * 2
        assert table[:first].any() and not table[first:].any()
        for grad in (w1, v1):
            assert grad[:, :6].any() and not grad[:, 6:].any()


def with_params(scene: Scene, **changed: Tensor) -> Scene:
    return dataclasses.replace(scene, params=dataclasses.replace(scene.params, **changed))


@needs_kernels
def test_nan_in_colour_reaches_outputs_and_gradients() -> None:
    """So that the engine sees it and skips the step."""
    scene, camera = make_scene("random"), make_camera(1, 8, 8)
    broken = with_params(scene, color_w2=torch.full((3, 64), float("nan")))
    sums, grads = broken.run(
        fused, camera, "albedo", torch.float32, None, random_cotangents(camera)
    )
    assert sums.rgb.isnan().any() and sums.opacity.isfinite().all()
    assert all(g.isnan().any() for g in grads)
    _, grads = broken.run(
        repeating, camera, "albedo", torch.float32, None, random_cotangents(camera)
    )
    assert all(g.isnan().any() for g in grads)


@needs_kernels
@pytest.mark.parametrize("name", ["density_w1", "density_w2", "table"])
def test_samples_without_a_density_are_dropped_and_end_the_ray(name: str) -> None:
    """As pruning does: NaN is at least no threshold."""
    scene, camera = make_scene("random"), make_camera(1, 8, 8)
    broken = with_params(
        scene, **{name: torch.full_like(getattr(scene.params, name), float("nan"))}
    )
    sums, grads = broken.run(
        fused, camera, "albedo", torch.float32, None, random_cotangents(camera)
    )
    kept, tried = sums.counts.tolist()
    assert kept == 0 and 0 < tried <= 2 * 64
    assert not any(getattr(sums, n).any() for n in SUMS)
    assert not any(g.any() for g in grads)


@needs_kernels
def test_large_colour_weights_do_not_overflow_in_f16() -> None:
    scene, camera = make_scene("random"), make_camera(1, 8, 8)
    signs = torch.where(torch.arange(64) % 2 == 0, 40.0, -40.0)
    steep = with_params(scene, color_w2=signs.expand(3, 64).contiguous())
    cotangents = random_cotangents(camera)
    _, exact = steep.run(twin, camera, "albedo", torch.float64, None, cotangents)
    _, ours = steep.run(fused, camera, "albedo", torch.float32, None, cotangents)
    for name, a, e in zip(PARAMS, ours, exact, strict=True):
        assert relative_error(a, e) < 0.1, name  # f16: ReLUs that turn over


@needs_kernels
def test_gradients_are_the_parameters_alone() -> None:
    """Cameras, lights and jitter are given: asking for their gradient breaks nothing."""
    scene, camera = make_scene("random"), to(make_camera(1, 8, 8), torch.float32)
    c2w = camera.c2w.clone().requires_grad_()
    lights = camera.light_positions.clone().requires_grad_()
    asked = dataclasses.replace(camera, c2w=c2w, light_positions=lights)
    frozen = FieldParams(*(p.to(DEVICE) for p in scene.params.tensors()))
    arguments = (scene.spec, 8, scene.occupancy.to(DEVICE), scene.marching, "diffuse")
    sums = fused(asked, frozen, *arguments, alpha_bound=None, jitter=None)
    assert not sums.rgb.requires_grad
    learnt = dataclasses.replace(frozen, color_w2=frozen.color_w2.clone().requires_grad_())
    fused(asked, learnt, *arguments, alpha_bound=None, jitter=None).rgb.sum().backward()
    assert learnt.color_w2.grad is not None and learnt.color_w2.grad.any()
    assert c2w.grad is None and lights.grad is None


@needs_kernels
@pytest.mark.parametrize("active", [0, 1, 8])
def test_views_may_share_memory_and_be_none(active: int) -> None:
    scene, one = make_scene("random"), make_camera(1, 5, 9)
    scene.active_levels = active

    def views(n: int) -> Camera:
        tensors = {
            f.name: getattr(one, f.name).expand(n, *getattr(one, f.name).shape[1:])
            for f in dataclasses.fields(one)
            if isinstance(getattr(one, f.name), Tensor)
        }
        return dataclasses.replace(one, **tensors)

    single, _ = scene.run(fused, one, "diffuse", torch.float32)
    three, _ = scene.run(fused, views(3), "diffuse", torch.float32)
    none, _ = scene.run(fused, views(0), "diffuse", torch.float32)
    for name in SUMS:
        value = getattr(single, name)
        assert torch.equal(getattr(three, name), torch.cat([value] * 3)), name
        assert getattr(none, name).numel() == 0
    assert none.counts.tolist() == [0, 0]


@needs_kernels
def test_steps_beyond_the_words_kept_are_not_taken() -> None:
    """A million units away f32 sees more steps inside the box than its diagonal has."""
    scene, camera = make_scene("blob"), make_camera(2, 4, 8)
    step = 2 * 3**0.5 * 2 / (59 * 32 - 8.001)
    scene.marching = dataclasses.replace(scene.marching, step_size=step)
    look = torch.tensor([0.57745, 0.57741, 0.57718])
    right = torch.nn.functional.normalize(
        torch.linalg.cross(look, torch.tensor([0.0, 0, 1])), dim=0
    )
    up = torch.linalg.cross(right, look)
    c2w = torch.stack([right, up, -look, -1.076e6 * look], dim=-1).expand(2, 3, 4).contiguous()
    far = dataclasses.replace(camera, c2w=c2w, fovy=torch.full((2,), 1e-20))
    near, _ = scene.run(fused, far, "albedo", torch.float32)
    sums, grads = scene.run(fused, far, "albedo", torch.float32, None, random_cotangents(far))
    assert torch.equal(sums.opacity[:32], sums.opacity[32:])  # the second view's words are whole
    assert sums.counts[1] <= near.counts[1]
    assert all(g.isfinite().all() for g in grads)


@needs_kernels
def test_passes_opcheck() -> None:
    scene, camera = make_scene("random"), to(make_camera(1, 5, 6), torch.float32)
    leaves = [p.to(DEVICE).requires_grad_() for p in scene.params.tensors()]
    views = (camera.c2w, camera.fovy, camera.light_positions, None)
    inputs = (*views, scene.occupancy.to(DEVICE), None, *leaves)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    cotangents = [c.to(DEVICE, torch.float32) for c in random_cotangents(camera)]
    for deterministic in (0, 1):
        sizes = [5, 6, 2, 7, 1, deterministic]
        numbers = (sizes, [0.07, 0.0, 1e-4, 0.01], list(_native.field_numbers(scene.spec)))
        torch.library.opcheck(op._forward, (*inputs, *numbers), test_utils=checks)
        with torch.no_grad():
            *sums, _, _, kept, half = op._forward(*inputs, *numbers)
        weights = [p.detach() for p in leaves[1:]]
        given = (*views, half, *weights, *sums, kept, *cotangents, *numbers)
        torch.library.opcheck(op._backward, given, test_utils=("test_faketensor",))


@needs_kernels
def test_without_gradient_nothing_is_kept_for_it() -> None:
    scene, camera = make_scene("random"), make_camera(1, 9, 9)
    with_grad, _ = scene.run(
        fused, camera, "diffuse", torch.float32, None, random_cotangents(camera)
    )
    without, _ = scene.run(fused, camera, "diffuse", torch.float32)
    for name in SUMS:
        assert torch.equal(getattr(with_grad, name), getattr(without, name)), name
    assert with_grad.counts.tolist() == without.counts.tolist()


@pytest.mark.skipif(not (ON_GPU and _native.has_cuda()), reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_graph_capture_and_side_stream(deterministic: bool) -> None:
    """No host synchronisation, no hidden state: a replay follows its inputs."""
    scene, camera = make_scene("random"), to(make_camera(2, 33, 31), torch.float32)
    leaves = [p.to(DEVICE, torch.float32).requires_grad_() for p in scene.params.tensors()]
    occupancy = scene.occupancy.to(DEVICE)
    cotangents = [c.to(DEVICE, torch.float32) for c in random_cotangents(camera)]
    c2w = camera.c2w.clone()
    static = dataclasses.replace(camera, c2w=c2w)

    def step() -> tuple[list[Tensor], list[Tensor]]:
        sums = op.render_views(
            static, FieldParams(*leaves), scene.spec, 8, occupancy, scene.marching, "diffuse",
            backend="cuda", deterministic=deterministic,
        )  # fmt: skip
        outputs = [getattr(sums, name) for name in SUMS]
        grads = torch.autograd.grad(outputs, leaves, cotangents)
        return [*outputs, sums.counts], list(grads)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = step()
    torch.cuda.current_stream().wait_stream(side)
    plain = step()
    for a, b in zip(on_side[0], plain[0], strict=True):
        assert torch.equal(a, b)

    def check(grads: list[Tensor], others: list[Tensor]) -> None:
        for a, b in zip(grads, others, strict=True):
            if deterministic:
                assert torch.equal(a, b)
            assert relative_error(a, b) < 1e-5  # atomics: another order of additions

    check(on_side[1], plain[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = to(make_camera(2, 33, 31, seed=5), torch.float32).c2w
    for given in (other, camera.c2w, other):
        c2w.copy_(given)
        for tensor in (*captured[0], *captured[1]):
            tensor.fill_(-7)
        graph.replay()
        outputs, grads = step()
        for a, b in zip(captured[0], outputs, strict=True):
            assert torch.equal(a, b)
        check(captured[1], grads)


@needs_kernels
def test_more_tiles_than_32_bits_count_are_refused() -> None:
    """Before anything is read: all addresses are null here."""
    native = _native.native_field(_native.field_numbers(FieldSpec(GRID)), 8)
    sizes = [1 << 19, 512, 512, 17, 16, 0]  # 2^32 tiles
    lengths, nowhere = [0.01, 0.0, 1e-4, 0.01], [0] * 20
    module = _native.extension()
    assert module.render_views_fwd(0, native, sizes, lengths, nowhere, 0, 0) == 1
    given = (0, native, sizes, lengths, nowhere, 0, [0] * 11)
    assert module.render_views_bwd(*given, 0) == 1
    assert module.render_views_bwd_deterministic(*given, 0, 0, 0, 0, 0) == 1


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not (ON_GPU and _native.has_cuda()), reason="needs a CUDA device")
def test_more_numbers_than_32_bits_count() -> None:
    """2.2e9 numbers of colour (30 GiB in all): many equal views, the last as good as the first."""
    scene, one = make_scene("blob"), to(make_camera(1, 128, 128), torch.float32)
    scene.marching = dataclasses.replace(scene.marching, step_size=0.7)
    n_views = 44_000
    camera = dataclasses.replace(
        one,
        c2w=one.c2w.expand(n_views, -1, -1),
        fovy=one.fovy.expand(n_views),
        light_positions=one.light_positions.expand(n_views, -1),
    )
    many, _ = scene.run(fused, camera, "diffuse", torch.float32)
    single, _ = scene.run(fused, one, "diffuse", torch.float32)
    assert many.rgb.numel() > 2**31
    assert many.counts.tolist() == [n_views * c for c in single.counts.tolist()]
    for name in SUMS:
        values, first = getattr(many, name), getattr(single, name)
        assert first.any(), name
        for view in (0, n_views // 2, n_views - 1):
            assert torch.equal(values[view * 128 * 128 : (view + 1) * 128 * 128], first), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shading": "shiny"}, "shading: expected one of"),
        ({"active_levels": 9}, "active_levels"),
        ({"occupancy": torch.ones(4, 4, 3, dtype=torch.bool)}, "occupancy: expected a cube"),
        ({"marching": MarchSpec(0.0)}, "marching.step_size"),
        ({"marching": MarchSpec(0.1, near=-1.0)}, "marching.near"),
        ({"jitter": torch.zeros(3)}, "jitter: expected shape"),
        ({"alpha_bound": torch.zeros(1)}, "alpha_bound: expected shape"),
        ({"backend": "cpu"}, 'no "cpu" kernel'),
        ({"backend": "cuda"}, '"cuda" takes cuda tensors'),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    scene = make_scene("blob")
    arguments = {
        "camera": make_camera(1, 4, 4),
        "params": scene.params,
        "spec": scene.spec,
        "active_levels": 8,
        "occupancy": scene.occupancy,
        "marching": scene.marching,
        "shading": "albedo",
        **change,
    }
    with pytest.raises(SDIFastError, match=message):
        op.render_views(**arguments)


def test_the_twin_runs_where_there_are_no_kernels() -> None:
    scene, camera = make_scene("blob"), make_camera(1, 6, 6)
    arguments = (camera, scene.params, scene.spec, 8, scene.occupancy, scene.marching, "diffuse")
    expected, ours = twin(*arguments), op.render_views(*arguments, backend="reference")
    for name in SUMS:
        assert torch.equal(getattr(ours, name), getattr(expected, name))
    assert not op.can_fuse(scene.spec, camera.c2w.device, camera.c2w.dtype)
