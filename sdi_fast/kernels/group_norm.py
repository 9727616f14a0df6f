"""Group norm and SiLU on channels-last activations, forward only.

Twin: group_norm of sdi_fast/reference/unet_ops.py.

y = silu((x + shift - mean) rstd weight + bias), mean and rstd over N rows and the C / G channels of
a group. x may be two tensors side by side (a skip connection): they are read where they lie and
the normalised concatenation is written; a group may straddle their border.

Mapping: one program a (sample, group) where there are enough of these to fill the GPU: it reads its
rows for the statistics and again, from L1 or L2, to write. A group's channels in a row are few
(10 to 80), so that the lanes run over the group's elements, vec neighbouring channels each, and no
lane is idle. With splits > 1 that many programs share a group: a first kernel leaves mean and
sum of squares of each share, and the second combines them (Chan) and writes. On demand images get
a line and a column of zeros behind them, which conv3x3_padded.py wants.

Precision: statistics in f32, about a pivot, the mean of the first tile, so that a mean much larger
than the deviation does not cancel. Bytes per element in f16: 2 read from memory, 2 from the cache,
2 written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_VEC = 8  # elements a lane reads at once: 16 bytes of f16
MAX_WARPS = 16
FULL_GPU = 96  # programs that keep an H100 or H200 (132 processors) busy enough


@triton.jit
def _load(
    x: tl.tensor,
    skip: tl.tensor,
    shift: tl.tensor,
    sample: tl.tensor,
    place: tl.tensor,  # [n_lanes, 1] index into the group's N * per vectors
    group: tl.tensor,
    n_rows: tl.tensor,
    c_x: tl.tensor,
    c_skip: tl.tensor,
    shift_stride: tl.tensor,
    stop: tl.tensor,
    per: tl.constexpr,
    vec: tl.constexpr,
    has_skip: tl.constexpr,
    has_shift: tl.constexpr,
) -> tl.tuple:
    """x + shift in f32, its row, channel and whether it exists, all [n_lanes, vec]."""
    row = place // per
    channel = group * (per * vec) + (place % per) * vec + tl.arange(0, vec)[None, :]
    inside = (place < stop) & (channel >= 0)
    at = sample * n_rows + row
    if has_skip:
        left = inside & (channel < c_x)
        right = inside & (channel >= c_x)
        value = tl.load(x + at * c_x + channel, mask=left, other=0.0).to(tl.float32)
        value += tl.load(skip + at * c_skip + (channel - c_x), mask=right, other=0.0).to(tl.float32)
    else:
        value = tl.load(x + at * c_x + channel, mask=inside, other=0.0).to(tl.float32)
    if has_shift:
        value += tl.load(shift + sample * shift_stride + channel, mask=inside, other=0.0).to(
            tl.float32
        )
    return value, at, channel, inside


@triton.jit
def _statistics(
    x: tl.tensor,
    skip: tl.tensor,
    shift: tl.tensor,
    sample: tl.tensor,
    group: tl.tensor,
    n_rows: tl.tensor,
    c_x: tl.tensor,
    c_skip: tl.tensor,
    shift_stride: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    n_lanes: tl.constexpr,
    per: tl.constexpr,
    vec: tl.constexpr,
    has_skip: tl.constexpr,
    has_shift: tl.constexpr,
) -> tl.tuple:
    """Mean and sum of squared deviations over the places [start, stop)."""
    lanes = tl.arange(0, n_lanes)[:, None]
    first, _, _, inside = _load(
        x, skip, shift, sample, start + lanes, group, n_rows, c_x, c_skip, shift_stride, stop,
        per, vec, has_skip, has_shift,
    )  # fmt: skip
    n_first = tl.minimum(stop - start, n_lanes) * vec
    pivot = tl.sum(tl.sum(tl.where(inside, first, 0.0), 1), 0) / n_first
    total = tl.zeros([n_lanes, vec], tl.float32)
    squares = tl.zeros([n_lanes, vec], tl.float32)
    for tile in range(start, stop, n_lanes):
        value, _, _, inside = _load(
            x, skip, shift, sample, tile + lanes, group, n_rows, c_x, c_skip, shift_stride, stop,
            per, vec, has_skip, has_shift,
        )  # fmt: skip
        off = tl.where(inside, value - pivot, 0.0)
        total += off
        squares += off * off
    s1 = tl.sum(tl.sum(total, 1), 0)
    s2 = tl.sum(tl.sum(squares, 1), 0)
    n = ((stop - start) * vec).to(tl.float32)
    return pivot + s1 / n, tl.maximum(s2 - s1 * s1 / n, 0.0)


@triton.jit(do_not_specialize=("n_rows", "n_groups", "rows_a_split"))
def _partial_statistics(
    x: tl.tensor,  # [B, N, c_x]
    skip: tl.tensor,  # [B, N, c_skip] where has_skip
    shift: tl.tensor,  # [B or 1, C] where has_shift
    partial: tl.tensor,  # [B * G, splits, 2] f32: mean, sum of squared deviations
    n_rows: tl.tensor,
    c_x: tl.tensor,
    c_skip: tl.tensor,
    shift_stride: tl.tensor,
    n_groups: tl.tensor,
    rows_a_split: tl.tensor,
    splits: tl.constexpr,
    n_lanes: tl.constexpr,
    per: tl.constexpr,
    vec: tl.constexpr,
    has_skip: tl.constexpr,
    has_shift: tl.constexpr,
) -> None:
    split = tl.program_id(0)
    sample = (tl.program_id(1) // n_groups).to(tl.int64)
    group = tl.program_id(1) % n_groups
    start = split * rows_a_split * per
    stop = tl.minimum(start + rows_a_split * per, n_rows * per)
    mean, m2 = _statistics(
        x, skip, shift, sample, group, n_rows, c_x, c_skip, shift_stride, start, stop,
        n_lanes, per, vec, has_skip, has_shift,
    )  # fmt: skip
    at = partial + 2 * (tl.program_id(1) * splits + split)
    tl.store(at, mean)
    tl.store(at + 1, m2)


@triton.jit(do_not_specialize=("n_rows", "n_groups", "rows_a_split", "width"))
def _group_norm(
    x: tl.tensor,  # [B, N, c_x]
    skip: tl.tensor,  # [B, N, c_skip] where has_skip
    shift: tl.tensor,  # [B or 1, C] where has_shift
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    partial: tl.tensor,  # [B * G, splits, 2] f32 where splits > 1
    out: tl.tensor,  # [B, N, C]
    n_rows: tl.tensor,
    c_x: tl.tensor,
    c_skip: tl.tensor,
    shift_stride: tl.tensor,
    n_groups: tl.tensor,
    rows_a_split: tl.tensor,
    width: tl.tensor,  # of the image, where padded
    eps: tl.tensor,
    splits: tl.constexpr,
    splits_pad: tl.constexpr,
    n_lanes: tl.constexpr,
    per: tl.constexpr,
    vec: tl.constexpr,
    has_skip: tl.constexpr,
    has_shift: tl.constexpr,
    silu: tl.constexpr,
    padded: tl.constexpr,
) -> None:
    split = tl.program_id(0)
    sample = (tl.program_id(1) // n_groups).to(tl.int64)
    group = tl.program_id(1) % n_groups
    start = split * rows_a_split * per
    stop = tl.minimum(start + rows_a_split * per, n_rows * per)
    n = (n_rows * (per * vec)).to(tl.float32)
    if splits == 1:
        mean, m2 = _statistics(
            x, skip, shift, sample, group, n_rows, c_x, c_skip, shift_stride, start, stop,
            n_lanes, per, vec, has_skip, has_shift,
        )  # fmt: skip
    else:
        i = tl.arange(0, splits_pad)
        at = partial + 2 * (tl.program_id(1) * splits + i)
        means = tl.load(at, mask=i < splits, other=0.0)
        squares = tl.load(at + 1, mask=i < splits, other=0.0)
        counts = tl.minimum(n_rows - i * rows_a_split, rows_a_split) * (per * vec)
        counts = tl.where(i < splits, counts, 0).to(tl.float32)
        mean = tl.sum(means * counts, 0) / n
        m2 = tl.sum(squares + counts * (means - mean) * (means - mean), 0)
    rstd = 1.0 / tl.sqrt(m2 / n + eps)
    n_out = n_rows  # of a sample
    if padded:
        n_out = (n_rows // width + 1) * (width + 1)
    lanes = tl.arange(0, n_lanes)[:, None]
    for tile in range(start, stop, n_lanes):
        value, at_row, channel, inside = _load(
            x, skip, shift, sample, tile + lanes, group, n_rows, c_x, c_skip, shift_stride, stop,
            per, vec, has_skip, has_shift,
        )  # fmt: skip
        w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        y = (value - mean) * (rstd * w) + b
        if silu:
            y = y / (1.0 + tl.exp(-y))
        if padded:
            row = at_row - sample * n_rows
            at_row = sample * n_out + row + row // width  # one more a line
        where = out + at_row * (c_x + c_skip) + channel
        tl.store(where, y.to(out.dtype.element_ty), mask=inside)
    if padded and split == 0:  # the last column, then the last line
        height = n_rows // width
        for tile in range(0, (height + width + 1) * per, n_lanes):
            place = tile + lanes
            row = place // per
            line = tl.minimum(row, height)
            row = line * (width + 1) + tl.where(row < height, width, row - height)
            channel = group * (per * vec) + (place % per) * vec + tl.arange(0, vec)[None, :]
            inside = (place < (height + width + 1) * per) & (channel >= 0)
            where = out + (sample * n_out + row) * (c_x + c_skip) + channel
            zero = tl.zeros([n_lanes, vec], out.dtype.element_ty)
            tl.store(where, zero, mask=inside)


def default_splits(n_programs: int, n_rows: int) -> int:
    """How many programs share a group: enough in all to fill the GPU, none below 64 rows."""
    splits = 1
    while n_programs * splits < FULL_GPU and n_rows // (2 * splits) >= 64:
        splits *= 2
    return splits


def group_norm(
    parts: Sequence[Tensor],  # 1 or 2 of [B, N, C_i] contiguous
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    shift: Tensor | None,  # [B or 1, C], rows may be strided
    *,
    n_groups: int,
    eps: float,
    silu: bool,
    splits: int = 0,  # 0: default_splits
    warps: int = 0,  # of a program; 0: by the size of its share
    pad_width: int = 0,  # W: put a line and a column of zeros behind each image of N = H W pixels
) -> Tensor:
    """[B, N, C], or [B, (H + 1) (W + 1), C]."""
    x, skip = parts[0], parts[-1]
    b, n_rows, c_x = x.shape
    c_skip = skip.shape[2] if len(parts) == 2 else 0
    size = (c_x + c_skip) // n_groups  # channels of a group
    n_out = (n_rows // pad_width + 1) * (pad_width + 1) if pad_width else n_rows
    out = x.new_empty((b, n_out, c_x + c_skip))
    if out.numel() == 0:
        return out
    vec = 1
    while vec < MAX_VEC and size % (2 * vec) == 0 and c_x % (2 * vec) == 0:
        vec *= 2
    asked = splits or default_splits(b * n_groups, n_rows)
    rows_a_split = triton.cdiv(n_rows, asked)
    splits = triton.cdiv(n_rows, rows_a_split)  # none is empty
    places = rows_a_split * (size // vec)
    if not warps:
        warps = 4
        while warps < MAX_WARPS and warps * 1024 < places * vec:
            warps *= 2
    # 16 elements a lane at once: more would spill
    lanes = min(triton.next_power_of_2(places), warps * 32 * 16 // vec)
    constants = dict(
        n_lanes=lanes,
        per=size // vec,
        vec=vec,
        has_skip=len(parts) == 2,
        has_shift=shift is not None,
    )
    shifts = x if shift is None else shift
    stride = 0 if shift is None or shift.shape[0] == 1 else shift.stride(0)
    sizes = (n_rows, c_x, c_skip, stride, n_groups, rows_a_split)
    grid = (splits, b * n_groups)
    with torch.cuda.device_of(x):
        partial = x
        if splits > 1:
            partial = torch.empty((b * n_groups, splits, 2), dtype=torch.float32, device=x.device)
            _partial_statistics[grid](
                x, skip, shifts, partial, *sizes, splits=splits, num_warps=warps, **constants
            )
        _group_norm[grid](
            x, skip, shifts, weight, bias, partial, out, *sizes, max(pad_width, 1), eps,
            splits=splits, splits_pad=triton.next_power_of_2(splits), silu=silu,
            padded=pad_width > 0, num_warps=warps, **constants,
        )  # fmt: skip
    return out
