"""Compositing along rays on the GPU, forward and backward (methods.md D, Compositing).

Twin: sdi_fast/reference/composite.py. The same maths in C++: csrc/math/compositing.h.

x = density dt, T = exp(-sum of x before), w = T (1 - exp(-x)); O = sum w, depth = sum w t,
rgb = sum w c, normal_sum = sum w n, orient = sum sg(w) max(0, n . d)^2, z_variance = [O > .5] times
the variance of t under w / O. Backward, with G_k the cotangent of w_k:
d loss / d density_k = dt (T_{k+1} G_k - sum_{j>k} w_j G_j).

Mapping: one warp a program, which walks RAYS neighbouring rays side by side in blocks of BLOCK
samples, one lane each. Rays have about 30 samples and many have none, so that a whole warp a ray
would spend more on scans and sums over 32 lanes than on its samples; over 8 lanes these take 3
exchanges, shared by the 4 rays, and a block of f32 still fills a 32-byte sector. Neighbours are
about equally long, so that little waits for the longest. Nothing crosses warps: no barrier. (The
tile was chosen by counting instructions, not yet by timing.) The forward carries the optical depth
from the front. The backward sums the optical depth first, then walks from the back carrying what
is left of it and sum w G behind; it recomputes T and reads w.

Precision: per sample, the tensors'; exp is the GPU's exp2 (2 ulp in f32), given a sum rounded once.
In f64 always: the optical depth and sum w G behind (as the twin has them), and the moments of t
that give O, depth and z_variance. With u = t - the ray's first t_start, f64 moments give the
variance in the same walk: sum w u^2 - (sum w u)^2 / O loses 1e-16 (u / std)^2 of it, less than
f32's rounding unless std < 1e-4 u. rgb, normal_sum and orient are summed in each lane, a BLOCK-th
of the ray's terms, then over the lanes. Nothing is atomic: the same inputs give the same bits.

Bytes per sample in f32: 36 read and 4 written forward; 40 and 28 backward, which reads 12 of the 40
twice, from the cache unless the ray is long. The launchers zero the results per sample first, for
the samples that are in no row of packed_info: as many bytes again as the kernels write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..constants import Z_VARIANCE_MIN_OPACITY

RAYS = 4  # side by side; RAYS * BLOCK is a warp's 32 lanes
BLOCK = 8  # samples of each ray at once
N_WARPS = 1
# Terms of _alpha's series: at x = 1 the first one left out is below the rounding
SERIES_ORDER = {torch.float32: 11, torch.float64: 18}
# exp(-x) is 0 in f64 and f32 from here on; optical depths are capped, so that what the backward
# subtracts from their sum stays exact to 1e-10 however dense a sample is
MAX_OPTICAL = tl.constexpr(800.0)
LOG2E = tl.constexpr(1.4426950408889634)
MIN_OPACITY = tl.constexpr(Z_VARIANCE_MIN_OPACITY)


@triton.jit
def _rows(
    packed_info: tl.tensor,  # [R, 2] i64
    n_rays: tl.tensor,
    n_samples: tl.tensor,
    rays: tl.constexpr,
) -> tl.tuple:
    """This program's rays: index, whether it exists, first sample, count, whether the row fits.

    A row that leaves [0, N) counts as empty, lest it read what is not a sample.
    """
    ray = tl.program_id(0).to(tl.int64) * rays + tl.arange(0, rays)
    live = ray < n_rays
    first = tl.load(packed_info + 2 * ray, mask=live, other=0)
    count = tl.load(packed_info + 2 * ray + 1, mask=live, other=0)
    fits = (first >= 0) & (count >= 0) & (count <= n_samples - first)
    return ray, live, first, tl.where(fits, count, 0), fits


@triton.jit
def _load3(base: tl.tensor, row: tl.tensor, mask: tl.tensor) -> tl.tuple:
    """The components of rows (i64) of a [.., 3] tensor."""
    x = tl.load(base + 3 * row, mask=mask, other=0.0)
    y = tl.load(base + 3 * row + 1, mask=mask, other=0.0)
    z = tl.load(base + 3 * row + 2, mask=mask, other=0.0)
    return x, y, z


@triton.jit
def _store3(base: tl.tensor, row: tl.tensor, v: tl.tuple, mask: tl.tensor) -> None:
    tl.store(base + 3 * row, v[0], mask=mask)
    tl.store(base + 3 * row + 1, v[1], mask=mask)
    tl.store(base + 3 * row + 2, v[2], mask=mask)


@triton.jit
def _add3(total: tl.tuple, w: tl.tensor, v: tl.tuple) -> tl.tuple:
    return total[0] + w * v[0], total[1] + w * v[1], total[2] + w * v[2]


@triton.jit
def _sum3(v: tl.tuple) -> tl.tuple:
    """Over the samples."""
    return tl.sum(v[0], 1), tl.sum(v[1], 1), tl.sum(v[2], 1)


@triton.jit
def _dot3(per_sample: tl.tuple, per_ray: tl.tuple) -> tl.tensor:
    x = per_sample[0] * per_ray[0][:, None]
    return x + per_sample[1] * per_ray[1][:, None] + per_sample[2] * per_ray[2][:, None]


@triton.jit
def _outer3(per_sample: tl.tensor, per_ray: tl.tuple) -> tl.tuple:
    x, y = per_sample * per_ray[0][:, None], per_sample * per_ray[1][:, None]
    return x, y, per_sample * per_ray[2][:, None]


@triton.jit
def _clamp_min_0(x: tl.tensor) -> tl.tensor:
    """max(0, x), but a NaN stays one."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _interval(
    density: tl.tensor, t_starts: tl.tensor, t_ends: tl.tensor, sample: tl.tensor, mask: tl.tensor
) -> tl.tuple:
    """Length, middle and optical depth of samples; the latter also capped in f64 (NaN stays)."""
    start = tl.load(t_starts + sample, mask=mask, other=0.0)
    end = tl.load(t_ends + sample, mask=mask, other=0.0)
    step = end - start
    optical = tl.load(density + sample, mask=mask, other=0.0) * step
    capped = tl.where(optical > MAX_OPTICAL, MAX_OPTICAL, optical).to(tl.float64)
    return step, 0.5 * (start + end), optical, capped


@triton.jit
def _transmittance(optical: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """exp(-optical) of a sum in f64, rounded once before the exponential."""
    return tl.exp2((optical * -LOG2E).to(dtype))


@triton.jit
def _alpha(optical: tl.tensor, order: tl.constexpr) -> tl.tensor:
    """1 - exp(-x); below 1, where that cancels, by x - x^2/2! + .. x^order/order! (Horner)."""
    x = tl.minimum(optical, 1.0)
    series = x * 0.0 + 1.0
    for k in tl.static_range(order, 1, -1):
        series = 1.0 - x * (1.0 / k) * series
    return tl.where(optical < 1.0, x * series, 1.0 - tl.exp2(optical * -LOG2E))


@triton.jit
def _depth_moments(
    m: tl.tuple,  # sums of w, w u, w u^2 over the samples, u = t - origin, f64
    origin: tl.tensor,  # f64
    dtype: tl.constexpr,
) -> tl.tuple:
    """O, depth and z_variance, all [rays]."""
    opacity = m[0].to(dtype)
    thick = opacity > MIN_OPACITY  # of the rounded one, which is what the backward sees
    some = tl.where(thick, m[0], 1.0)
    variance = _clamp_min_0((m[2] - m[1] * m[1] / some) / some)
    return opacity, origin * m[0] + m[1], tl.where(thick, variance, 0.0)


@triton.jit(do_not_specialize=("n_rays", "n_samples"))
def _composite_fwd(
    density: tl.tensor,  # [N] 1/scene unit, >= 0
    rgb: tl.tensor,  # [N, 3]
    normal: tl.tensor,  # [N, 3] unit length
    t_starts: tl.tensor,  # [N] scene units
    t_ends: tl.tensor,  # [N] scene units
    packed_info: tl.tensor,  # [R, 2] i64: first sample, number of samples
    directions: tl.tensor,  # [R, 3] unit length
    rgb_sum: tl.tensor,  # [R, 3]
    opacity: tl.tensor,  # [R]
    depth: tl.tensor,  # [R] scene units
    normal_sum: tl.tensor,  # [R, 3]
    z_variance: tl.tensor,  # [R] scene units^2
    orient: tl.tensor,  # [R]
    weights: tl.tensor,  # [N] zeroed
    n_rays: tl.tensor,
    n_samples: tl.tensor,
    rays: tl.constexpr,
    block: tl.constexpr,
    order: tl.constexpr,
) -> None:
    ray, live, first, count, fits = _rows(packed_info, n_rays, n_samples, rays)
    d = _load3(directions, ray, live)
    origin = tl.load(t_starts + first, mask=count > 0, other=0.0).to(tl.float64)
    # a row that does not fit gives NaN sums: an error would need a synchronisation
    zero = tl.zeros([rays, block], density.dtype.element_ty)
    zero += tl.where(fits, 0.0, float("nan"))[:, None]
    zero64 = zero.to(tl.float64)
    colour, normals, away_sum = (zero, zero, zero), (zero, zero, zero), zero
    moments = (zero64, zero64, zero64)
    carried = tl.zeros([rays], tl.float64)  # optical depth before the block
    for start in range(0, tl.max(count), block):
        place = start + tl.arange(0, block)[None, :]
        inside = place < count[:, None]
        sample = first[:, None] + place
        step, middle, optical, capped = _interval(density, t_starts, t_ends, sample, inside)
        before = carried[:, None] + (tl.cumsum(capped, 1) - capped)
        carried += tl.sum(capped, 1)
        w = _transmittance(before, optical.dtype) * _alpha(optical, order)
        tl.store(weights + sample, w, mask=inside)
        u, w64 = middle.to(tl.float64) - origin[:, None], w.to(tl.float64)
        moments = (moments[0] + w64, moments[1] + w64 * u, moments[2] + w64 * (u * u))
        colour = _add3(colour, w, _load3(rgb, sample, inside))
        n = _load3(normal, sample, inside)
        normals = _add3(normals, w, n)
        away = _clamp_min_0(_dot3(n, d))
        away_sum += w * (away * away)
    _store3(rgb_sum, ray, _sum3(colour), live)
    _store3(normal_sum, ray, _sum3(normals), live)
    tl.store(orient + ray, tl.sum(away_sum, 1), mask=live)
    ray_sums = _depth_moments(_sum3(moments), origin, density.dtype.element_ty)
    tl.store(opacity + ray, ray_sums[0], mask=live)
    tl.store(depth + ray, ray_sums[1], mask=live)
    tl.store(z_variance + ray, ray_sums[2], mask=live)


@triton.jit
def _optical_depth(
    density: tl.tensor,
    t_starts: tl.tensor,
    t_ends: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    rays: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """Of the whole rays, [rays] f64."""
    total = tl.zeros([rays, block], tl.float64)
    for start in range(0, tl.max(count), block):
        place = start + tl.arange(0, block)[None, :]
        sample, inside = first[:, None] + place, place < count[:, None]
        total += _interval(density, t_starts, t_ends, sample, inside)[3]
    return tl.sum(total, 1)


@triton.jit
def _cotangent_terms(
    opacity: tl.tensor,  # [rays], as all
    depth: tl.tensor,
    z_variance: tl.tensor,
    grad_opacity: tl.tensor,
    grad_z_variance: tl.tensor,
) -> tl.tuple:
    """centre, a, b: of w's cotangent, opacity and z_variance give a + b (t - centre)^2."""
    thick = opacity > MIN_OPACITY
    some = tl.where(thick, opacity, 1.0).to(tl.float64)
    centre = tl.where(thick, depth / some, 0.0).to(opacity.dtype)
    b = tl.where(thick, grad_z_variance / some, 0.0).to(opacity.dtype)
    return centre, grad_opacity - b * z_variance, b


@triton.jit(do_not_specialize=("n_rays", "n_samples"))
def _composite_bwd(
    density: tl.tensor,  # [N] and so on, as in _composite_fwd
    rgb: tl.tensor,
    normal: tl.tensor,
    t_starts: tl.tensor,
    t_ends: tl.tensor,
    packed_info: tl.tensor,
    directions: tl.tensor,
    weights: tl.tensor,
    opacity: tl.tensor,
    depth: tl.tensor,
    z_variance: tl.tensor,
    grad_rgb_sum: tl.tensor,  # [R, 3]
    grad_opacity: tl.tensor,  # [R]
    grad_depth: tl.tensor,  # [R]
    grad_normal_sum: tl.tensor,  # [R, 3]
    grad_z_variance: tl.tensor,  # [R]
    grad_orient: tl.tensor,  # [R]
    grad_density: tl.tensor,  # [N] zeroed
    grad_rgb: tl.tensor,  # [N, 3] zeroed
    grad_normal: tl.tensor,  # [N, 3] zeroed
    n_rays: tl.tensor,
    n_samples: tl.tensor,
    rays: tl.constexpr,
    block: tl.constexpr,
) -> None:
    ray, live, first, count, fits = _rows(packed_info, n_rays, n_samples, rays)
    d = _load3(directions, ray, live)
    g_colour, g_normal = _load3(grad_rgb_sum, ray, live), _load3(grad_normal_sum, ray, live)
    g_depth = tl.load(grad_depth + ray, mask=live, other=0.0)[:, None]
    g_orient = tl.load(grad_orient + ray, mask=live, other=0.0)[:, None]
    centre, a, b = _cotangent_terms(
        tl.load(opacity + ray, mask=live, other=0.0),
        tl.load(depth + ray, mask=live, other=0.0),
        tl.load(z_variance + ray, mask=live, other=0.0),
        tl.load(grad_opacity + ray, mask=live, other=0.0),
        tl.load(grad_z_variance + ray, mask=live, other=0.0),
    )
    optical_sum = _optical_depth(density, t_starts, t_ends, first, count, rays, block)
    behind_sum = tl.zeros([rays], tl.float64)  # w G of the blocks behind
    n_blocks = tl.cdiv(tl.max(count), block)
    for i in range(n_blocks):
        place = (n_blocks - 1 - i) * block + tl.arange(0, block)[None, :]
        sample, inside = first[:, None] + place, place < count[:, None]
        step, middle, optical, capped = _interval(density, t_starts, t_ends, sample, inside)
        w = tl.load(weights + sample, mask=inside, other=0.0)
        n = _load3(normal, sample, inside)
        off = middle - centre[:, None]
        g = a[:, None] + g_depth * middle + b[:, None] * (off * off)
        g += _dot3(_load3(rgb, sample, inside), g_colour) + _dot3(n, g_normal)
        optical_sum -= tl.sum(capped, 1)
        after = _transmittance(optical_sum[:, None] + tl.cumsum(capped, 1), g.dtype)
        wg = (w * g).to(tl.float64)
        behind_sum += tl.sum(wg, 1)
        behind = behind_sum[:, None] - tl.cumsum(wg, 1)
        tl.store(grad_density + sample, step * (after * g - behind).to(g.dtype), mask=inside)
        _store3(grad_rgb, sample, _outer3(w, g_colour), inside)
        tilt = 2.0 * g_orient * w * _clamp_min_0(_dot3(n, d))
        _store3(grad_normal, sample, _add3(_outer3(w, g_normal), 1.0, _outer3(tilt, d)), inside)


def composite_fwd(
    density: Tensor,  # [N] f32 or f64, 1/scene unit, >= 0
    rgb: Tensor,  # [N, 3]
    normal: Tensor,  # [N, 3] unit length
    t_starts: Tensor,  # [N] scene units
    t_ends: Tensor,  # [N] scene units
    packed_info: Tensor,  # [R, 2] i64: first sample, number of samples
    directions: Tensor,  # [R, 3] unit length
) -> tuple[Tensor, ...]:
    """rgb, opacity, depth, normal_sum, z_variance, orient, weights, shaped as in Composited.

    A ray whose row of packed_info leaves [0, N) gets NaN sums, but for z_variance, which is 0.
    """
    given = (density, rgb, normal, t_starts, t_ends, packed_info, directions)
    n_rays, n_samples = directions.shape[0], density.shape[0]
    shapes = ((n_rays, 3), (n_rays,), (n_rays,), (n_rays, 3), (n_rays,), (n_rays,))
    results = (*(density.new_empty(shape) for shape in shapes), density.new_zeros(n_samples))
    _launch(_composite_fwd, given, results, order=SERIES_ORDER[density.dtype])
    return results


def composite_bwd(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of density [N], rgb [N, 3] and normal [N, 3].

    Takes composite_fwd's arguments; its weights, opacity, depth and z_variance; then the gradients
    of rgb, opacity, depth, normal_sum, z_variance and orient.
    """
    density, rgb, normal = (t.new_zeros(t.shape) for t in given[:3])
    _launch(_composite_bwd, given, (density, rgb, normal))
    return density, rgb, normal


def _launch(
    kernel: Any, given: Sequence[Tensor], results: Sequence[Tensor], **constants: int
) -> None:
    n_samples, n_rays = given[0].shape[0], given[6].shape[0]
    if n_rays == 0:
        return
    tensors = (*(t.contiguous() for t in given), *results)
    with torch.cuda.device_of(given[0]):
        kernel[(triton.cdiv(n_rays, RAYS),)](
            *tensors, n_rays, n_samples, rays=RAYS, block=BLOCK, num_warps=N_WARPS, **constants
        )
