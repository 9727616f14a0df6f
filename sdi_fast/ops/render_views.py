"""The fused renderer: from cameras to per-ray sums, and back (methods.md D).

Kernels: csrc/cuda/render_fwd.cu and render_bwd.cu. They compute in f16 and f32 (each file says
what in what), store nothing per sample and never wait for the host, so that a CUDA graph can hold
them. Only for CUDA; elsewhere the twin, or the single ops as sdi_fast.render.Renderer lists them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..constants import SHADINGS
from ..reference.render_views import render_views as render_views_reference
from ..types import Camera, FieldParams, FieldSpec, MarchSpec, RaySums, SDIFastError
from ._checks import check_grid, check_positive, check_tensor
from ._native import (
    call,
    extension,
    field_numbers,
    has_cuda,
    native_field,
    resolve_backend,
)

MAX_LEVELS = 16  # csrc/render.h kFusedLevels
N_FEATURES = 2  # kFusedFeatures
HIDDEN = 64  # kFusedHidden
TILE_WIDTH, TILE_HEIGHT = 8, 4  # kTileWidth, kTileHeight: pixels of a warp


def can_fuse(spec: FieldSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels are there and take such fields there, with tensors of `dtype`."""
    return device.type == "cuda" and dtype == torch.float32 and has_cuda() and _fits(spec)


def _fits(spec: FieldSpec) -> bool:
    grid = spec.grid
    return grid.n_levels <= MAX_LEVELS and grid.n_features == N_FEATURES and spec.hidden == HIDDEN


def render_views(
    camera: Camera,
    params: FieldParams,
    spec: FieldSpec,
    active_levels: int,
    occupancy: Tensor,  # [G, G, G] bool, index (x, y, z)
    marching: MarchSpec,
    shading: str,  # "albedo", "textureless" or "diffuse"
    *,
    alpha_bound: Tensor | None = None,  # [] density * dt; the threshold where that is lower
    jitter: Tensor | None = None,  # [R] scene units, in [0, step_size)
    backend: str = "auto",
    deterministic: bool = False,
) -> RaySums:
    """Per-ray sums over the samples that can be seen, R = B * height * width rays.

    Gradients go to the five parameters (f32), through colour, opacity, depth, normals, z_variance
    and orient. On CUDA table and products are f16, sums f32: entries of the table, their
    differences between neighbours, first-layer weights and density_w2 have to stay below 65504.

    Args:
        deterministic: gradients that repeat bit by bit on GPUs of one kind. The kernels then take
            the samples twice and 8 bytes more for every number of the table. The sums repeat either
            way; the twin's gradients do under torch.use_deterministic_algorithms.

    Raises:
        SDIFastError: for tensors that do not fit each other, an unknown shading, or on CUDA a field
            of another form than 2 features a level, at most 16 levels, 64 hidden units.
    """
    _check(camera, params, spec, active_levels, occupancy, marching)
    if shading not in SHADINGS:
        raise SDIFastError(f"shading: expected one of {', '.join(SHADINGS)}, got {shading!r}")
    n_rays = camera.batch_size * camera.height * camera.width
    for name, value, shape in (("alpha_bound", alpha_bound, ()), ("jitter", jitter, (n_rays,))):
        if value is not None:
            check_tensor(name, value, shape, like=camera.c2w)
    if resolve_backend("render_views", camera.c2w, backend, ("cuda",)) == "reference":
        return render_views_reference(
            camera,
            params,
            spec,
            active_levels,
            occupancy,
            marching,
            shading,
            alpha_bound=alpha_bound,
            jitter=jitter,
        )
    if not _fits(spec):
        grid = spec.grid
        raise SDIFastError(
            f"spec: expected at most {MAX_LEVELS} levels of {N_FEATURES} features and {HIDDEN} "
            f"hidden units, got {grid.n_levels}, {grid.n_features} and {spec.hidden}"
        )
    check_tensor("camera.c2w", camera.c2w, tuple(camera.c2w.shape), dtype=torch.float32)
    return _run(
        camera,
        params,
        spec,
        active_levels,
        occupancy,
        marching,
        shading,
        alpha_bound,
        jitter,
        deterministic,
    )


def _check(
    camera: Camera,
    params: FieldParams,
    spec: FieldSpec,
    active_levels: int,
    occupancy: Tensor,
    marching: MarchSpec,
) -> None:
    c2w = camera.c2w
    check_tensor("camera.c2w", c2w, (None, 3, 4))
    check_tensor("camera.fovy", camera.fovy, (c2w.shape[0],), like=c2w)
    check_tensor("camera.light_positions", camera.light_positions, (c2w.shape[0], 3), like=c2w)
    for name in ("height", "width"):
        if getattr(camera, name) < 0:
            raise SDIFastError(f"camera.{name}: expected >= 0, got {getattr(camera, name)}")
    check_grid(params.table, spec.grid, active_levels, c2w)
    n_in, hidden = spec.grid.n_output_dims, spec.hidden
    check_tensor("params.density_w1", params.density_w1, (hidden, n_in), like=c2w)
    check_tensor("params.density_w2", params.density_w2, (1, hidden), like=c2w)
    check_tensor("params.color_w1", params.color_w1, (hidden, n_in), like=c2w)
    check_tensor("params.color_w2", params.color_w2, (3, hidden), like=c2w)
    check_tensor("occupancy", occupancy, (None, None, None), dtype=torch.bool, like=c2w)
    if occupancy.numel() == 0 or len(set(occupancy.shape)) != 1:
        raise SDIFastError(
            f"occupancy: expected a cube [G, G, G] with G >= 1, got {list(occupancy.shape)}"
        )
    check_positive("spec.radius", spec.radius)
    check_positive("spec.blob_std", spec.blob_std)
    check_positive("marching.step_size", marching.step_size)
    for name in ("near", "early_stop_eps", "alpha_threshold"):
        check_positive(f"marching.{name}", getattr(marching, name), zero_ok=True)


def _run(
    camera: Camera,
    params: FieldParams,
    spec: FieldSpec,
    active_levels: int,
    occupancy: Tensor,
    marching: MarchSpec,
    shading: str,
    alpha_bound: Tensor | None,
    jitter: Tensor | None,
    deterministic: bool = False,
) -> RaySums:
    wants_grad = torch.is_grad_enabled() and any(p.requires_grad for p in params.tensors())
    flags = [int(wants_grad), int(deterministic)]
    sizes = [camera.height, camera.width, SHADINGS.index(shading), active_levels, *flags]
    m = marching
    lengths = [m.step_size, m.near, m.early_stop_eps, m.alpha_threshold]
    given = (camera.c2w, camera.fovy, camera.light_positions, jitter, occupancy, alpha_bound)
    scene = [None if t is None else t.detach() for t in given]  # gradients: the parameters' alone
    numbers = (sizes, [float(v) for v in lengths], list(field_numbers(spec)))
    results = _forward(*scene, *params.tensors(), *numbers)
    return RaySums(*results[:7])


_SCENE = "Tensor c2w, Tensor fovy, Tensor lights, Tensor? jitter"
_WEIGHTS = "Tensor density_w1, Tensor density_w2, Tensor color_w1, Tensor color_w2"
# height, width, shading, active levels, whether a backward follows, whether it has to repeat; step
# size, near, early stop's transmittance, alpha threshold; the field as _native.field_numbers
_NUMBERS = "int[] sizes, float[] lengths, float[] spec"


@torch.library.custom_op(
    "sdi_fast::render_views_fwd",
    mutates_args=(),
    schema=f"({_SCENE}, Tensor occupancy, Tensor? alpha_bound, Tensor table, {_WEIGHTS}, "
    f"{_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*args: Any) -> tuple[Tensor, ...]:
    """A RaySums' members, then what the backward needs: kept steps and the f16 table."""
    c2w, fovy, lights, jitter, occupancy, alpha_bound, table, *weights = _contiguous(args[:11])
    sizes, lengths, spec = args[11:]
    half = table.to(torch.float16)
    sums = _empty_sums(c2w, sizes)
    counts = c2w.new_empty(2, dtype=torch.int64)
    kept = c2w.new_empty(_kept_shape(c2w, sizes, lengths, spec), dtype=torch.int32)
    bits = c2w.new_empty(-(-occupancy.numel() // 32), dtype=torch.int32)
    scene = (c2w, fovy, lights, _or_null(jitter), occupancy, _or_null(alpha_bound))
    call(
        "render_views_fwd",
        c2w,
        native_field(tuple(spec), sizes[3]),
        _native_sizes(c2w, sizes, kept, occupancy.shape[0]),
        lengths,
        [_address(t) for t in (*scene, half, *weights, *sums, counts, kept, bits)],
        c2w.new_empty(1, dtype=torch.int32),
    )
    return (*sums, counts, kept, half)


@torch.library.custom_op(
    "sdi_fast::render_views_bwd",
    mutates_args=(),
    schema=f"({_SCENE}, Tensor half, {_WEIGHTS}, Tensor rgb, Tensor opacity, Tensor depth, "
    "Tensor normal_sum, Tensor z_variance, Tensor kept, Tensor grad_rgb, Tensor grad_opacity, "
    "Tensor grad_depth, Tensor grad_normal_sum, Tensor grad_z_variance, Tensor grad_orient, "
    f"{_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of the five parameters."""
    c2w, fovy, lights, jitter, half, *rest = _contiguous(args[:21])
    weights, sums, kept, cotangents = rest[:4], rest[4:9], rest[9], rest[10:]
    sizes, lengths, spec = args[21:]
    grads = (c2w.new_zeros(half.shape), *(torch.zeros_like(w) for w in weights))
    # the forward's order; what only it reads is null
    addresses = [c2w, fovy, lights, _or_null(jitter), 0, 0, half, *weights, *sums, 0, 0, kept, 0]
    deterministic = bool(sizes[5])
    call(
        "render_views_bwd_deterministic" if deterministic else "render_views_bwd",
        c2w,
        native_field(tuple(spec), sizes[3]),
        _native_sizes(c2w, sizes, kept, 1),
        lengths,
        [_address(t) for t in addresses],
        c2w.new_empty(1, dtype=torch.int32),
        [_address(t) for t in (*cotangents, *grads)],
        *(_repeating_sums(half) if deterministic else ()),
    )
    return grads


def _repeating_sums(half: Tensor) -> tuple[Tensor, ...]:
    """csrc/render.h RenderViewsSums: the table's, the weights', and what scales the former."""
    module = extension()
    with torch.cuda.device_of(half):
        n_warps = module.render_views_bwd_warps()
    return (
        half.new_empty(half.shape, dtype=torch.int64),
        half.new_empty((n_warps, module.RENDER_VIEWS_WEIGHTS), dtype=torch.float32),
        half.new_empty(256, dtype=torch.int64),
        half.new_empty(2, dtype=torch.float32),
    )


def _contiguous(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    return [t if t is None else t.contiguous() for t in tensors]


def _or_null(tensor: Tensor | None) -> Tensor | int:
    return 0 if tensor is None else tensor


def _address(tensor: Tensor | int) -> int:
    return tensor.data_ptr() if isinstance(tensor, Tensor) else tensor


def _empty_sums(c2w: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """rgb, opacity, depth, normal_sum, z_variance, orient."""
    n = c2w.shape[0] * sizes[0] * sizes[1]
    return tuple(c2w.new_empty(shape) for shape in ((n, 3), (n,), (n,), (n, 3), (n,), (n,)))


def _kept_shape(
    c2w: Tensor, sizes: list[int], lengths: list[float], spec: list[float]
) -> tuple[int, ...]:
    """[tiles, words, 32], or nothing where no backward follows."""
    if not sizes[4]:
        return (0, 0, 32)
    tiles = c2w.shape[0] * -(-sizes[0] // TILE_HEIGHT) * -(-sizes[1] // TILE_WIDTH)
    return tiles, n_words(radius=spec[5], step_size=lengths[0]), 32


def n_words(radius: float, step_size: float) -> int:
    """32-bit words a ray that `kept` takes: a bit for each step on the box's diagonal."""
    words = int(extension().render_views_words(radius, step_size))
    if words < 1:
        raise SDIFastError(f"marching.step_size: expected more of the box's side, got {step_size}")
    return words


def _native_sizes(c2w: Tensor, sizes: list[int], kept: Tensor, resolution: int) -> list[int]:
    return [c2w.shape[0], sizes[0], sizes[1], kept.shape[1], resolution, sizes[2]]


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    c2w, table = args[0], args[6]
    sizes, lengths, spec = args[11:]
    return (
        *_empty_sums(c2w, sizes),
        c2w.new_empty(2, dtype=torch.int64),
        c2w.new_empty(_kept_shape(c2w, sizes, lengths, spec), dtype=torch.int32),
        table.new_empty(table.shape, dtype=torch.float16),
    )


@_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return args[0].new_empty(args[4].shape), *(w.new_empty(w.shape) for w in args[5:9])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    c2w, fovy, lights, jitter, _, _, _, *weights = inputs[:11]
    ctx.numbers = inputs[11:]
    rgb, opacity, depth, normal_sum, z_variance, _, counts, kept, half = output
    ctx.mark_non_differentiable(counts, kept, half)
    ctx.set_materialize_grads(False)  # lest `kept` and `half` get zeros of their size
    ctx.save_for_backward(
        c2w, fovy, lights, jitter, half, *weights, rgb, opacity, depth, normal_sum, z_variance, kept
    )


def _autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    rgb, opacity = saved[9], saved[10]
    likes = (rgb, opacity, opacity, rgb, opacity, opacity)  # depth, normal_sum and so on, by shape
    given = [
        torch.zeros_like(like) if grad is None else grad
        for grad, like in zip(grads[:6], likes, strict=True)
    ]
    parameters = _backward(*saved, *given, *ctx.numbers)
    return *(None,) * 6, *parameters, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
