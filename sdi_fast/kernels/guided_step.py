"""Guidance and a DDIM step on the GPU, in one launch (methods.md A, B3, C3, C6, C7).

Twin: sdi_fast/reference/guided_step.py. The same maths in C++: csrc/math/guided_step.h.

d = p - u, e = u + scale (d + sum_i w_i ((n_i - u) - d <n_i - u, d> / max(<d, d>, 1e-6))), or
without negatives u (or p) + scale d; z = (x - sqrt(1 - a) e) / sqrt(a) for a model of the noise;
x' = sqrt(a') z + sqrt(1 - a') e + eta sqrt(V) xi.

Mapping: PARTS programs a sample. With Perp-Neg each of them sums the dot products over the whole
sample, in the same order, so that no program waits for another and all agree to the last bit; then
it updates its own part, BLOCK numbers at once, of which four neighbours share a Philox counter. No
atomics: the same bits at every run.

Precision: x's dtype, into which outputs are widened as they are read; the drawn noise in f32.
Bytes per number of x in f32 with 4 outputs in f16: 8 read PARTS times (from the L2 cache but once),
12 read and 8 written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..constants import PERP_EPS

PARTS = 8  # programs a sample
BLOCK = 1024  # numbers a program updates at once
REDUCE = 4096  # numbers of each condition that a program sums at once
N_WARPS = 8
MIN_LENGTH = tl.constexpr(PERP_EPS)


@triton.jit
def _normals(
    rng: tl.tensor,  # [2] i64: seed, offset
    draw: tl.tensor,
    sample: tl.tensor,
    group: tl.tensor,  # [G]
) -> tl.tensor:
    """[4 G] f32: four standard normals a group, as reference/philox.py has them."""
    seed, offset = tl.load(rng), tl.load(rng + 1) + draw
    zero = group.to(tl.uint32) * 0
    c1 = zero + sample.to(tl.uint32)
    c2, c3 = zero + offset.to(tl.uint32), zero + (offset >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group.to(tl.uint32), c1, c2, c3)
    r0, r2 = tl.sqrt(-2.0 * tl.log(_uniform(w0))), tl.sqrt(-2.0 * tl.log(_uniform(w2)))
    a0, a2 = 6.283185307179586 * _uniform(w1), 6.283185307179586 * _uniform(w3)
    even = tl.interleave(r0 * tl.cos(a0), r2 * tl.cos(a2))
    odd = tl.interleave(r0 * tl.sin(a0), r2 * tl.sin(a2))
    return tl.interleave(even, odd)


@triton.jit
def _uniform(word: tl.tensor) -> tl.tensor:
    """(0, 1] of a 32-bit word."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _alpha(levels: tl.tensor, t: tl.tensor, n_levels: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    last = tl.minimum(tl.maximum(t, -1), n_levels - 2)
    return tl.load(levels + last + 1).to(dtype)


@triton.jit
def _projections(
    outputs: tl.tensor,  # of the sample
    n: tl.tensor,  # numbers a sample
    stride: tl.tensor,  # from one condition to the next
    dtype: tl.constexpr,
    reduce: tl.constexpr,
) -> tl.tuple:
    """<n_i - u, d> / <d, d> of both negatives, over the whole sample."""
    s1, s2 = tl.zeros([reduce], dtype), tl.zeros([reduce], dtype)
    length = tl.zeros([reduce], dtype)
    for start in range(0, n, reduce):
        j = start + tl.arange(0, reduce)
        inside = j < n
        uncond = tl.load(outputs + stride + j, mask=inside, other=0.0).to(dtype)
        d = tl.load(outputs + j, mask=inside, other=0.0).to(dtype) - uncond
        first = tl.load(outputs + 2 * stride + j, mask=inside, other=0.0).to(dtype)
        second = tl.load(outputs + 3 * stride + j, mask=inside, other=0.0).to(dtype)
        s1 += (first - uncond) * d
        s2 += (second - uncond) * d
        length += d * d
    total = tl.maximum(tl.sum(length), MIN_LENGTH)
    return tl.sum(s1) / total, tl.sum(s2) / total


# Rows of one tensor come at all alignments: a variant for each would have to be compiled in a
# graph's capture, which CUDA refuses.
@triton.jit(
    do_not_specialize=("step", "draw", "n_levels", "batch"),
    do_not_specialize_on_alignment=("levels", "t", "t_next", "neg_weights", "lengths", "noise"),
)
def _guided_step(
    outputs: tl.tensor,  # [K, B, C, P], or [K, B, P, C]
    x: tl.tensor,  # [B, C, P]
    levels: tl.tensor,  # [n_levels] f32
    t: tl.tensor,  # [B] i64
    t_next: tl.tensor,  # [B] i64; where moves
    neg_weights: tl.tensor,  # [B, 2]; where perp_neg
    lengths: tl.tensor,  # [B] i64; where ends
    noise: tl.tensor,  # [B, C, P], or where draws the RNG [2] i64
    result: tl.tensor,  # [B, C, P]
    eps: tl.tensor,  # [B, C, P]
    batch: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    n_levels: tl.tensor,
    step: tl.tensor,
    draw: tl.tensor,
    scale: tl.tensor,  # f32, as eta
    eta: tl.tensor,
    perp_neg: tl.constexpr,
    paper: tl.constexpr,
    v_prediction: tl.constexpr,
    channels_last: tl.constexpr,
    moves: tl.constexpr,
    ends: tl.constexpr,
    noisy: tl.constexpr,  # 0: no, 1: given, 2: drawn
    parts: tl.constexpr,
    block: tl.constexpr,
    reduce: tl.constexpr,
) -> None:
    dtype: tl.constexpr = x.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    n = channels * pixels
    stride = batch.to(tl.int64) * n
    first = sample * n
    outputs += first
    if perp_neg:
        along1, along2 = _projections(outputs, n, stride, dtype, reduce)
        weight1 = tl.load(neg_weights + 2 * sample)
        weight2 = tl.load(neg_weights + 2 * sample + 1)
    a = _alpha(levels, tl.load(t + sample), n_levels, dtype)
    signal, spread = tl.sqrt(a), tl.sqrt(1.0 - a)
    per_part = tl.cdiv(tl.cdiv(n, 4), parts) * 4
    begin = tl.program_id(1) * per_part
    stop = tl.minimum(begin + per_part, n)
    for start in range(begin, stop, block):
        j = start + tl.arange(0, block)
        inside = j < stop
        at = (j % pixels) * channels + j // pixels if channels_last else j
        xj = tl.load(x + first + j, mask=inside, other=0.0)
        positive = tl.load(outputs + at, mask=inside, other=0.0).to(dtype)
        uncond = tl.load(outputs + stride + at, mask=inside, other=0.0).to(dtype)
        d = positive - uncond
        if perp_neg:
            one = tl.load(outputs + 2 * stride + at, mask=inside, other=0.0).to(dtype) - uncond
            two = tl.load(outputs + 3 * stride + at, mask=inside, other=0.0).to(dtype) - uncond
            total = d + weight1 * (one - along1 * d) + weight2 * (two - along2 * d)
            output = uncond + scale * total
        else:
            output = (uncond if paper else positive) + scale * d
        if v_prediction:
            x0, e = signal * xj - spread * output, signal * output + spread * xj
        else:
            x0, e = (xj - spread * output) / signal, output
        tl.store(eps + first + j, e, mask=inside)
        if moves:
            b = _alpha(levels, tl.load(t_next + sample), n_levels, dtype)
            moved = tl.sqrt(b) * x0 + tl.sqrt(1.0 - b) * e
            if noisy:
                if noisy == 2:
                    group = start // 4 + tl.arange(0, block // 4)
                    xi = _normals(noise, draw, sample, group).to(dtype)
                else:
                    xi = tl.load(noise + first + j, mask=inside, other=0.0)
                variance = (1.0 - a) * (a - b) / ((1.0 - b) * a)
                moved += eta * tl.sqrt(tl.maximum(variance, 0.0)) * xi
            if ends:
                moved = tl.where(tl.load(lengths + sample) > step, moved, xj)
            x0 = moved
        tl.store(result + first + j, x0, mask=inside)


def guided_step_launch(
    outputs: Tensor,  # [K, B, C, h, w] f16, bf16 or x's dtype; contiguous or channels_last
    x: Tensor,  # [B, C, h, w] f32 or f64, contiguous
    others: Sequence[Tensor | None],  # levels, t, t_next, neg_weights, lengths, noise, rng
    integers: Sequence[int],  # step, draw, paper_convention, v_prediction
    numbers: Sequence[float],  # scale, eta
) -> tuple[Tensor, Tensor]:
    """x at t_next (or z) and the guided eps, [B, C, h, w] each."""
    levels, t, t_next, neg_weights, lengths, noise, rng = others
    assert levels is not None
    result, eps = torch.empty_like(x), torch.empty_like(x)
    batch, channels, height, width = x.shape
    step, draw, paper, v_prediction = integers
    drawn = noise is None and rng is not None
    with torch.cuda.device_of(x):
        _guided_step[(batch, PARTS)](
            outputs, x, levels, t,
            t_next if t_next is not None else t,
            neg_weights if neg_weights is not None else x,
            lengths if lengths is not None else t,
            rng if drawn else noise if noise is not None else x,
            result, eps, batch, channels, height * width, levels.numel(), step, draw, *numbers,
            perp_neg=neg_weights is not None,
            paper=bool(paper),
            v_prediction=bool(v_prediction),
            channels_last=not outputs.is_contiguous(),
            moves=t_next is not None,
            ends=lengths is not None,
            noisy=2 if drawn else 1 if noise is not None else 0,
            parts=PARTS, block=BLOCK, reduce=REDUCE, num_warps=N_WARPS,
        )  # fmt: skip
    return result, eps
