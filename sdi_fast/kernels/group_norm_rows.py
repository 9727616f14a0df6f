"""Group norm in two launches over blocks of rows, for images too large to hold.

Twin: group_norm of sdi_fast/reference/unet_ops.py; formula and choice: group_norm.py.

Mapping: the first kernel's programs take some rows of a slab of whole groups, about 128 channels
(10 channels a group in slabs of 120: 240 bytes of f16 a row), and leave each group's mean and sum
of squared deviations. The second one's take some rows of tile_channels channels, 64: 128 aligned
bytes a row, every lane busy, since its exponentials and divisions take as long as the memory. Each
combines the shares of the few groups it meets, in the order of the splits (Chan), while its reads
are under way.

Precision: sums in f32 about the first row of a share, per channel, so that a mean much larger than
the deviation does not cancel. Bytes per element in f16: 4 read, 2 of them from L2, 2 written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import silu as apply_silu


@triton.jit
def _read(
    x: tl.tensor,
    skip: tl.tensor,
    row: tl.tensor,  # [rows, 1] i64, of all samples
    channel: tl.tensor,  # [1, channels]
    mask: tl.tensor,
    c_x: tl.tensor,
    c_skip: tl.tensor,
    has_skip: tl.constexpr,
) -> tl.tensor:
    """The parts side by side."""
    if has_skip:
        left = tl.load(x + row * c_x + channel, mask=mask & (channel < c_x), other=0.0)
        at = skip + row * c_skip + (channel - c_x)
        right = tl.load(at, mask=mask & (channel >= c_x), other=0.0)
        return tl.where(channel < c_x, left, right)
    return tl.load(x + row * c_x + channel, mask=mask, other=0.0)


@triton.jit(do_not_specialize=("n_rows", "n_groups", "size", "rows_a_split"))
def _group_norm_sums(
    x: tl.tensor,  # [B, N, c_x]
    skip: tl.tensor,  # [B, N, c_skip] where has_skip
    shift: tl.tensor,  # [B or 1, C] where has_shift
    partial: tl.tensor,  # [B, 2, splits, G] f32: means, sums of squared deviations
    n_rows: tl.tensor,  # N
    c_x: tl.tensor,
    c_skip: tl.tensor,
    shift_stride: tl.tensor,
    n_groups: tl.tensor,  # G
    size: tl.tensor,  # channels of a group
    rows_a_split: tl.tensor,
    slab: tl.constexpr,  # channels of a program, whole groups
    tile_rows: tl.constexpr,
    steps: tl.constexpr,  # tiles whose reads are in flight at once
    turns: tl.constexpr,  # of so many tiles
    tile_channels: tl.constexpr,  # slab or a little more
    tile_groups: tl.constexpr,
    has_skip: tl.constexpr,
    has_shift: tl.constexpr,
) -> None:
    split = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, tile_channels)[None, :]
    channel = tl.program_id(1) * slab + lane
    real = (lane < slab) & (channel < c_x + c_skip)
    start = split * rows_a_split
    stop = tl.minimum(start + rows_a_split, n_rows)
    top = sample * n_rows
    pivot = _read(x, skip, top + start, channel, real, c_x, c_skip, has_skip)
    total = tl.zeros([tile_rows, tile_channels], tl.float32)
    squares = tl.zeros([tile_rows, tile_channels], tl.float32)
    for turn in range(turns):
        tile = start + turn * (tile_rows * steps)
        values = ()
        for step in tl.static_range(steps):
            row = tile + step * tile_rows + tl.arange(0, tile_rows)[:, None]
            # beyond the end the first row again, which is the pivot and adds nothing
            row = top + tl.where(row < stop, row, start)
            value = _read(x, skip, row, channel, real, c_x, c_skip, has_skip)
            values = values + (value,)  # type: ignore[assignment]
        for step in tl.static_range(steps):
            off = values[step].to(tl.float32) - pivot.to(tl.float32)
            total += off
            squares += off * off
    n = (stop - start).to(tl.float32)
    s1 = tl.sum(total, 0)[None, :]
    m2 = tl.maximum(tl.sum(squares, 0)[None, :] - s1 * s1 / n, 0.0)
    mean = pivot.to(tl.float32) + s1 / n
    # a group's channels, about its first one's first value
    group = tl.arange(0, tile_groups)[:, None]
    n_here = slab // size  # groups of a slab
    of_all = tl.program_id(1) * n_here + group
    stored = (group < n_here) & (of_all < n_groups)
    centre = _read(x, skip, top + start, of_all * size, stored, c_x, c_skip, has_skip)
    centre = centre.to(tl.float32)
    if has_shift:
        row = shift + sample * shift_stride
        mean += tl.load(row + channel, mask=real, other=0.0)
        centre += tl.load(row + of_all * size, mask=stored, other=0.0)
    member = (lane // size == group) & real
    away = tl.where(member, mean - centre, 0.0)
    apart = tl.sum(away, 1)[:, None] / size
    m2 = tl.sum(tl.where(member, m2 + n * away * away, 0.0), 1)[:, None]
    m2 -= n * size * apart * apart
    at = partial + (sample * 2 * tl.num_programs(0) + split) * n_groups + of_all
    tl.store(at, centre + apart, mask=stored)
    tl.store(at + tl.num_programs(0) * n_groups, tl.maximum(m2, 0.0), mask=stored)


@triton.jit
def _combine(
    partial: tl.tensor,  # of the sample, [2, splits, G]
    group: tl.tensor,  # [1, groups]
    n_rows: tl.tensor,
    n_groups: tl.tensor,
    size: tl.tensor,
    rows_a_split: tl.tensor,
    splits: tl.tensor,
    eps: tl.tensor,
    splits_pad: tl.constexpr,
) -> tl.tuple:
    """Mean and 1 / deviation of whole groups, both [groups, 1]."""
    split = tl.arange(0, splits_pad)[:, None]
    there = (split < splits) & (group < n_groups)
    at = partial + split * n_groups + group
    pivot = tl.load(partial + group, mask=group < n_groups, other=0.0)
    means = tl.load(at, mask=there, other=0.0)
    squares = tl.load(at + splits * n_groups, mask=there, other=0.0)
    share = tl.minimum(n_rows - split * rows_a_split, rows_a_split).to(tl.float32) / n_rows
    off = tl.where(there, means - pivot, 0.0)
    apart = tl.sum(share * off, 0)[None, :]
    off = tl.where(there, off - apart, 0.0)
    variance = tl.sum(squares / (n_rows.to(tl.float32) * size) + share * off * off, 0)[None, :]
    rstd = 1.0 / tl.sqrt(variance + eps)
    return tl.trans(pivot + apart), tl.trans(rstd)


@triton.jit(do_not_specialize=("n_rows", "n_groups", "size", "rows_a_split", "splits"))
def _group_norm_write(
    x: tl.tensor,  # [B, N, c_x]
    skip: tl.tensor,  # [B, N, c_skip] where has_skip
    shift: tl.tensor,  # [B or 1, C] where has_shift
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    partial: tl.tensor,  # [B, 2, splits, G] f32
    out: tl.tensor,  # [B, N, C]
    n_rows: tl.tensor,  # N
    c_x: tl.tensor,  # a multiple of tile_channels where has_skip
    c_skip: tl.tensor,
    shift_stride: tl.tensor,
    n_groups: tl.tensor,  # G
    size: tl.tensor,  # channels of a group
    rows_a_split: tl.tensor,
    splits: tl.tensor,
    eps: tl.tensor,
    splits_pad: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_groups: tl.constexpr,
    has_skip: tl.constexpr,
    has_shift: tl.constexpr,
    silu: tl.constexpr,
) -> None:
    start = tl.program_id(1) * tile_channels
    sample = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, tile_channels)[None, :]
    channel = start + lane
    real = channel < c_x + c_skip
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)[:, None]
    inside = (row < n_rows) & real
    row = sample * n_rows + row
    if has_skip:
        if start < c_x:
            value = tl.load(x + row * c_x + channel, mask=inside, other=0.0)
        else:
            at = skip + row * c_skip + (channel - c_x)
            value = tl.load(at, mask=inside, other=0.0)
    else:
        value = tl.load(x + row * c_x + channel, mask=inside, other=0.0)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    first = start // size
    groups = tl.arange(0, tile_groups)
    mean, rstd = _combine(
        partial + sample * 2 * splits * n_groups, first + groups[None, :],
        n_rows, n_groups, size, rows_a_split, splits, eps, splits_pad,
    )  # fmt: skip
    member = channel // size == first + groups[:, None]
    centre = tl.sum(tl.where(member, mean, 0.0), 0)[None, :]
    scale = tl.sum(tl.where(member, rstd, 0.0), 0)[None, :] * w
    if has_shift:
        centre -= tl.load(shift + sample * shift_stride + channel, mask=real, other=0.0)
    y = (value.to(tl.float32) - centre) * scale + b
    if silu:
        y = apply_silu(y)
    at = out + row * (c_x + c_skip) + channel
    tl.store(at, y.to(out.dtype.element_ty), mask=inside)
