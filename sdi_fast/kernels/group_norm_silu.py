"""Group norm and SiLU on channels-last activations, forward and the gradient of the input.

Twin: sdi_fast/reference/group_norm_silu.py. For the VAE encoder of methods.md C2, whose weights are
frozen.

h = x + shift, n = (h - mean) rstd, y = n weight + bias, out = y sigmoid(y); backward, with
q = grad s (1 + y (1 - s)) weight, s = sigmoid(y): grad_x = rstd (q - E q - n E[q n]) + addend,
with E the mean over the group. The backward recomputes n and y; the forward leaves mean and rstd.

Mapping: a program takes whole rows (pixels) of all channels, so that reads are contiguous however
few channels a group has (4 of 128 at 512 x 512). Three launches each way: sums per channel over a
chunk of rows; one program a (sample, group) combines its channels and chunks; one pass that writes.
No atomics: the same bits at every run.

Precision: f32 inside (f64 for f64). The sums of squares are taken about the chunk's first row and
combined as in Chan et al., so that a mean much larger than the deviation does not cancel.
Bytes per number in f16: 4 read and 2 written forward; 8 (with an addend 10) and 2 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # numbers that a program holds at once
N_WARPS = 8
CHUNKS = 512  # of rows, at most, a sample: programs of the kernels that sum
ROW_TILES = 4  # tiles of rows that a program of the writing kernels takes


@triton.jit
def _rows(x: tl.tensor, shift: tl.tensor, at: tl.tensor, inside: tl.tensor, dtype: tl.constexpr,
          shifted: tl.constexpr, c: tl.tensor, n_channels: tl.tensor) -> tl.tensor:  # fmt: skip
    h = tl.load(x + at, mask=inside, other=0.0).to(dtype)
    if shifted:
        h += tl.load(shift + c, mask=c < n_channels, other=0.0).to(dtype)
    return h


@triton.jit
def _moments(
    x: tl.tensor,  # [B, P, C]
    shift: tl.tensor,  # [C] where shifted
    partial: tl.tensor,  # [B, chunks, 2, C] f32: mean, sum of squared deviations
    n_rows: tl.tensor,
    n_channels: tl.tensor,
    chunk_rows: tl.tensor,
    shifted: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    dtype: tl.constexpr = partial.dtype.element_ty
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, tile_channels)[None, :]
    base = x + sample * n_rows * n_channels
    first = chunk * chunk_rows
    stop = tl.minimum(first + chunk_rows, n_rows)
    real = c < n_channels
    pivot = _rows(
        base, shift, first.to(tl.int64) * n_channels + c, real, dtype, shifted, c, n_channels
    )
    s1 = tl.zeros([tile_rows, tile_channels], dtype)
    s2 = tl.zeros([tile_rows, tile_channels], dtype)
    for start in range(first, stop, tile_rows):
        row = start + tl.arange(0, tile_rows)[:, None]
        inside = (row < stop) & real
        at = row.to(tl.int64) * n_channels + c
        h = _rows(base, shift, at, inside, dtype, shifted, c, n_channels)
        off = tl.where(inside, h - pivot, 0.0)
        s1 += off
        s2 += off * off
    n = (stop - first).to(dtype)
    total = tl.sum(s1, 0)[None, :]
    spread = tl.sum(s2, 0)[None, :] - total * total / n
    out = partial + (sample * tl.num_programs(0) + chunk) * 2 * n_channels
    tl.store(out + c, pivot + total / n, mask=real)
    tl.store(out + n_channels + c, tl.maximum(spread, 0.0), mask=real)


@triton.jit
def _combine_moments(
    partial: tl.tensor,  # [B, chunks, 2, C]
    statistics: tl.tensor,  # [2, B, G]: mean, 1 / std
    n_rows: tl.tensor,
    n_channels: tl.tensor,
    chunk_rows: tl.tensor,
    n_chunks: tl.tensor,
    per_group: tl.tensor,
    eps: tl.tensor,
    pad_chunks: tl.constexpr,
    pad_channels: tl.constexpr,
) -> None:
    dtype: tl.constexpr = partial.dtype.element_ty
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, c = tl.arange(0, pad_chunks)[:, None], tl.arange(0, pad_channels)[None, :]
    inside = (chunk < n_chunks) & (c < per_group)
    at = partial + (sample * n_chunks + chunk) * 2 * n_channels + group * per_group + c
    means = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + n_channels, mask=inside, other=0.0)
    rows = tl.minimum(n_rows - chunk * chunk_rows, chunk_rows).to(dtype)
    count = tl.where(inside, rows, 0.0)
    n = (n_rows * per_group).to(dtype)
    mean = tl.sum(tl.sum(means * count, 1), 0) / n
    off = means - mean
    variance = tl.sum(tl.sum(squares + count * off * off, 1), 0) / n
    n_groups = tl.num_programs(0)
    out = statistics + sample * n_groups + group
    tl.store(out, mean)
    tl.store(out + tl.num_programs(1) * n_groups, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _affine(
    statistics: tl.tensor,  # [2, B, G]
    weight: tl.tensor,
    bias: tl.tensor,
    sample: tl.tensor,
    n_samples: tl.tensor,
    c: tl.tensor,  # [1, C]
    n_channels: tl.tensor,
    per_group: tl.tensor,
    dtype: tl.constexpr,
) -> tl.tuple:
    """mean, 1 / std, weight and bias of each channel."""
    real = c < n_channels
    n_groups = n_channels // per_group
    at = statistics + sample * n_groups + c // per_group
    mean = tl.load(at, mask=real, other=0.0)
    rstd = tl.load(at + n_samples * n_groups, mask=real, other=0.0)
    w = tl.load(weight + c, mask=real, other=0.0).to(dtype)
    b = tl.load(bias + c, mask=real, other=0.0).to(dtype)
    return mean, rstd, w, b


@triton.jit
def _write(
    x: tl.tensor,  # [B, P, C]
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    statistics: tl.tensor,
    out: tl.tensor,  # [B, P, C]
    n_rows: tl.tensor,
    n_channels: tl.tensor,
    per_group: tl.tensor,
    shifted: tl.constexpr,
    silu: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_channels: tl.constexpr,
    tiles: tl.constexpr,
) -> None:
    dtype: tl.constexpr = statistics.dtype.element_ty
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, tile_channels)[None, :]
    mean, rstd, w, b = _affine(
        statistics, weight, bias, sample, tl.num_programs(1), c, n_channels, per_group, dtype
    )
    base = sample * n_rows * n_channels
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * tile_rows + tl.arange(0, tile_rows)[:, None]
        inside = (row < n_rows) & (c < n_channels)
        at = base + row.to(tl.int64) * n_channels + c
        h = _rows(x, shift, at, inside, dtype, shifted, c, n_channels)
        y = (h - mean) * rstd * w + b
        if silu:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _inner(
    grad: tl.tensor, h: tl.tensor, mean: tl.tensor, rstd: tl.tensor, w: tl.tensor, b: tl.tensor,
    silu: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """n, and q of the opening."""
    normal = (h - mean) * rstd
    q = grad
    if silu:
        y = normal * w + b
        s = 1.0 / (1.0 + tl.exp(-y))
        q = q * (s * (1.0 + y * (1.0 - s)))
    return normal, q * w


@triton.jit
def _gradient_sums(
    grad: tl.tensor,  # [B, P, C]
    x: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    statistics: tl.tensor,
    partial: tl.tensor,  # [B, chunks, 2, C]: sums of q and of q n
    n_rows: tl.tensor,
    n_channels: tl.tensor,
    per_group: tl.tensor,
    chunk_rows: tl.tensor,
    shifted: tl.constexpr,
    silu: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    dtype: tl.constexpr = partial.dtype.element_ty
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, tile_channels)[None, :]
    mean, rstd, w, b = _affine(
        statistics, weight, bias, sample, tl.num_programs(1), c, n_channels, per_group, dtype
    )
    base = sample * n_rows * n_channels
    first = chunk * chunk_rows
    stop = tl.minimum(first + chunk_rows, n_rows)
    s1 = tl.zeros([tile_rows, tile_channels], dtype)
    s2 = tl.zeros([tile_rows, tile_channels], dtype)
    for start in range(first, stop, tile_rows):
        row = start + tl.arange(0, tile_rows)[:, None]
        inside = (row < stop) & (c < n_channels)
        at = base + row.to(tl.int64) * n_channels + c
        h = _rows(x, shift, at, inside, dtype, shifted, c, n_channels)
        g = tl.load(grad + at, mask=inside, other=0.0).to(dtype)  # 0 outside: q is 0 as well
        normal, q = _inner(g, h, mean, rstd, w, b, silu)
        s1 += q
        s2 += q * normal
    out = partial + (sample * tl.num_programs(0) + chunk) * 2 * n_channels
    tl.store(out + c, tl.sum(s1, 0)[None, :], mask=c < n_channels)
    tl.store(out + n_channels + c, tl.sum(s2, 0)[None, :], mask=c < n_channels)


@triton.jit
def _combine_sums(
    partial: tl.tensor,  # [B, chunks, 2, C]
    means: tl.tensor,  # [2, B, G]: of q and of q n
    n_rows: tl.tensor,
    n_channels: tl.tensor,
    n_chunks: tl.tensor,
    per_group: tl.tensor,
    pad_chunks: tl.constexpr,
    pad_channels: tl.constexpr,
) -> None:
    dtype: tl.constexpr = partial.dtype.element_ty
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, c = tl.arange(0, pad_chunks)[:, None], tl.arange(0, pad_channels)[None, :]
    inside = (chunk < n_chunks) & (c < per_group)
    at = partial + (sample * n_chunks + chunk) * 2 * n_channels + group * per_group + c
    n = (n_rows * per_group).to(dtype)
    out = means + sample * tl.num_programs(0) + group
    tl.store(out, tl.sum(tl.sum(tl.load(at, mask=inside, other=0.0), 1), 0) / n)
    along = tl.sum(tl.sum(tl.load(at + n_channels, mask=inside, other=0.0), 1), 0) / n
    tl.store(out + tl.num_programs(1) * tl.num_programs(0), along)


@triton.jit
def _write_gradient(
    grad: tl.tensor,  # [B, P, C]
    x: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    statistics: tl.tensor,
    means: tl.tensor,  # [2, B, G]
    addend: tl.tensor,  # [B, P, C] where adds
    grad_x: tl.tensor,  # [B, P, C]
    n_rows: tl.tensor,
    n_channels: tl.tensor,
    per_group: tl.tensor,
    shifted: tl.constexpr,
    silu: tl.constexpr,
    adds: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_channels: tl.constexpr,
    tiles: tl.constexpr,
) -> None:
    dtype: tl.constexpr = statistics.dtype.element_ty
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, tile_channels)[None, :]
    mean, rstd, w, b = _affine(
        statistics, weight, bias, sample, tl.num_programs(1), c, n_channels, per_group, dtype
    )
    mean_q, mean_qn, _, _ = _affine(
        means, weight, bias, sample, tl.num_programs(1), c, n_channels, per_group, dtype
    )
    base = sample * n_rows * n_channels
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * tile_rows + tl.arange(0, tile_rows)[:, None]
        inside = (row < n_rows) & (c < n_channels)
        at = base + row.to(tl.int64) * n_channels + c
        h = _rows(x, shift, at, inside, dtype, shifted, c, n_channels)
        g = tl.load(grad + at, mask=inside, other=0.0).to(dtype)
        normal, q = _inner(g, h, mean, rstd, w, b, silu)
        result = rstd * (q - mean_q - normal * mean_qn)
        if adds:
            result += tl.load(addend + at, mask=inside, other=0.0).to(dtype)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)


class _Plan:
    """Tiles and chunks for [B, P, C]."""

    def __init__(self, x: Tensor, n_groups: int) -> None:
        self.batch, self.rows, self.channels = x.shape
        self.groups, self.per_group = n_groups, self.channels // n_groups
        self.tile_channels = triton.next_power_of_2(self.channels)
        self.tile_rows = max(TILE // self.tile_channels, 1)
        row_tiles = triton.cdiv(self.rows, self.tile_rows)
        self.chunk_rows = triton.cdiv(row_tiles, CHUNKS) * self.tile_rows
        self.chunks = triton.cdiv(self.rows, self.chunk_rows)
        self.tiles = ROW_TILES if row_tiles >= 132 * ROW_TILES else 1
        self.dtype = torch.promote_types(x.dtype, torch.float32)

    @property
    def tile(self) -> dict[str, int]:
        return dict(tile_rows=self.tile_rows, tile_channels=self.tile_channels, num_warps=N_WARPS)

    @property
    def pads(self) -> dict[str, int]:
        return dict(
            pad_chunks=triton.next_power_of_2(self.chunks),
            pad_channels=triton.next_power_of_2(self.per_group),
        )

    @property
    def writers(self) -> tuple[int, int]:
        return triton.cdiv(self.rows, self.tile_rows * self.tiles), self.batch

    def empty(self, x: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=x.device)


def group_norm_silu_fwd(
    x: Tensor,  # [B, P, C] contiguous
    shift: Tensor | None,  # [C], added to x first
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    n_groups: int,
    eps: float,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """silu(gn(x + shift)) like x, and mean and 1 / std of each group, [2, B, G] f32 or f64."""
    p = _Plan(x, n_groups)
    partial = p.empty(x, p.batch, p.chunks, 2, p.channels)
    statistics, out = p.empty(x, 2, p.batch, n_groups), torch.empty_like(x)
    s, shifted = (x, False) if shift is None else (shift, True)
    with torch.cuda.device_of(x):
        _moments[(p.chunks, p.batch)](
            x, s, partial, p.rows, p.channels, p.chunk_rows, shifted=shifted, **p.tile
        )
        _combine_moments[(n_groups, p.batch)](
            partial, statistics, p.rows, p.channels, p.chunk_rows, p.chunks, p.per_group, eps,
            **p.pads,
        )  # fmt: skip
        _write[p.writers](
            x, s, weight, bias, statistics, out, p.rows, p.channels, p.per_group,
            shifted=shifted, silu=silu, tiles=p.tiles, **p.tile,
        )  # fmt: skip
    return out, statistics


def group_norm_silu_bwd(
    grad: Tensor,  # [B, P, C] contiguous, of the result
    x: Tensor,  # [B, P, C] contiguous, and so on, as in the forward
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,  # [2, B, G], from the forward
    addend: Tensor | None = None,  # [B, P, C] contiguous: added to the result
    silu: bool = True,
) -> Tensor:
    """The gradient of x, [B, P, C]."""
    p = _Plan(x, statistics.shape[2])
    partial = p.empty(x, p.batch, p.chunks, 2, p.channels)
    means, grad_x = torch.empty_like(statistics), torch.empty_like(x)
    s, shifted = (x, False) if shift is None else (shift, True)
    with torch.cuda.device_of(x):
        _gradient_sums[(p.chunks, p.batch)](
            grad, x, s, weight, bias, statistics, partial,
            p.rows, p.channels, p.per_group, p.chunk_rows, shifted=shifted, silu=silu, **p.tile,
        )  # fmt: skip
        _combine_sums[(p.groups, p.batch)](
            partial, means, p.rows, p.channels, p.chunks, p.per_group, **p.pads
        )
        _write_gradient[p.writers](
            grad, x, s, weight, bias, statistics, means, x if addend is None else addend, grad_x,
            p.rows, p.channels, p.per_group, shifted=shifted, silu=silu, adds=addend is not None,
            tiles=p.tiles, **p.tile,
        )  # fmt: skip
    return grad_x
