"""Group norm and SiLU on channels-last activations, forward only.

Twin: group_norm of sdi_fast/reference/unet_ops.py.

y = silu((x + shift - mean) rstd weight + bias), mean and rstd over N rows and the C / G channels of
a group. x may be two tensors side by side (a skip connection): they are read where they lie and
the normalised concatenation is written; a group may straddle their border.

Two ways. One launch (group_norm_held.py): a program a (sample, group), which it holds in registers;
for small images, where a second launch would cost as much as the first. Two launches
(group_norm_rows.py): statistics of `splits` shares of the rows, then a pass that writes; whole rows
are read 128 bytes at a time however few channels a group has, by as many programs as fill the GPU.
No atomics: the same bits at every run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .group_norm_held import _group_norm_held
from .group_norm_rows import _group_norm_sums, _group_norm_write

MAX_VEC = 8  # elements a lane reads at once: 16 bytes of f16
THREAD = 8  # elements a thread holds a step
HELD = 20480  # elements of a group that one program holds well: 40 a thread of 16 warps
MAX_HELD = 32768  # and at most
PROCESSORS = 132  # of an H100 or H200
SLAB = 128  # channels of a program that sums, about
BLOCK = 64  # channels of a program that writes
MAX_SPLITS = 64
WRITE_ROWS = 64


def default_splits(batch: int, n_rows: int, n_groups: int, size: int) -> int:
    """1: one launch; else the shares of two."""
    held = n_rows * size
    if held <= HELD // 2 or (held <= HELD and batch * n_groups <= PROCESSORS):
        return 1
    slabs = triton.cdiv(n_groups, _slab_groups(size, n_groups))
    rows = 128
    while rows > 32 and batch * slabs * triton.cdiv(n_rows, rows) < 2 * PROCESSORS:
        rows //= 2
    return min(triton.cdiv(n_rows, rows), MAX_SPLITS)


@functools.cache
def _slab_groups(size: int, n_groups: int) -> int:
    """Groups that a program sums: SLAB channels or less, a multiple of 8, or one such multiple."""
    step = MAX_VEC // math.gcd(size, MAX_VEC)  # groups whose channels are a multiple of 8
    return min(max(SLAB // (size * step), 1) * step, n_groups)


@dataclass(frozen=True)
class _Shape:
    """Of a call."""

    batch: int
    n_rows: int
    c_x: int
    c_skip: int
    n_groups: int
    shift_stride: int

    @property
    def size(self) -> int:
        return (self.c_x + self.c_skip) // self.n_groups


def group_norm(
    parts: Sequence[Tensor],  # 1 or 2 of [B, N, C_i] contiguous
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    shift: Tensor | None,  # [B or 1, C], rows may be strided
    *,
    n_groups: int,
    eps: float,
    silu: bool,
    splits: int = 0,  # 1: one launch where the group fits; more: of two; 0: default_splits
    warps: int = 0,  # of a program; 0: by the size of its share
) -> Tensor:
    """[B, N, C]."""
    x, skip = parts[0], parts[-1]
    b, n_rows, c_x = x.shape
    c_skip = skip.shape[2] if len(parts) == 2 else 0
    out = x.new_empty((b, n_rows, c_x + c_skip))
    if out.numel() == 0:
        return out
    stride = 0 if shift is None or shift.shape[0] == 1 else shift.stride(0)
    shape = _Shape(b, n_rows, c_x, c_skip, n_groups, stride)
    splits = splits or default_splits(b, n_rows, n_groups, shape.size)
    flags = dict(has_skip=len(parts) == 2, has_shift=shift is not None)
    tensors = (x, skip, x if shift is None else shift)
    launch = _launch_rows
    if splits == 1 and n_rows * shape.size <= MAX_HELD:
        launch = _launch_held
    with torch.cuda.device_of(x):
        launch(shape, tensors, weight, bias, out, eps, silu, splits, warps, flags)
    return out


def _launch_held(
    s: _Shape, tensors: tuple, weight: Tensor, bias: Tensor, out: Tensor, eps: float, silu: bool,
    splits: int, warps: int, flags: dict[str, bool],
) -> None:  # fmt: skip
    vec = math.gcd(s.size, s.c_x, MAX_VEC)
    n = s.n_rows * s.size
    if not warps:
        warps = 4
        while warps < 16 and warps * 32 * 5 * THREAD < n:
            warps *= 2
    lanes = min(warps * 32 * THREAD, triton.next_power_of_2(n)) // vec
    steps = triton.cdiv(n, lanes * vec)
    _group_norm_held[(s.n_groups, s.batch)](
        *tensors, weight, bias, out, s.n_rows, s.c_x, s.c_skip, s.shift_stride, eps,
        n_lanes=lanes, steps=steps, per=s.size // vec, vec=vec, exact=lanes * steps * vec == n,
        silu=silu, num_warps=warps, **flags,
    )  # fmt: skip


def _launch_rows(
    s: _Shape, tensors: tuple, weight: Tensor, bias: Tensor, out: Tensor, eps: float, silu: bool,
    splits: int, warps: int, flags: dict[str, bool],
) -> None:  # fmt: skip
    rows_a_split = triton.cdiv(s.n_rows, splits)
    splits = triton.cdiv(s.n_rows, rows_a_split)  # none is empty
    partial = out.new_empty((s.batch, 2, splits, s.n_groups), dtype=torch.float32)
    groups = _slab_groups(s.size, s.n_groups)
    slab = groups * s.size
    tile_channels = triton.next_power_of_2(slab)
    # a vector a thread, up to 8 at once
    sum_warps = warps or (8 if rows_a_split * tile_channels > 8192 else 4)
    tile_rows = max(sum_warps * 32 * MAX_VEC // tile_channels, 1)
    steps = min(triton.cdiv(rows_a_split, tile_rows), 8)
    slabs = triton.cdiv(s.n_groups, groups)
    channels = (s.c_x, s.c_skip, s.shift_stride, s.n_groups, s.size, rows_a_split)
    _group_norm_sums[(splits, slabs, s.batch)](
        *tensors, partial, s.n_rows, *channels, slab=slab, tile_rows=tile_rows, steps=steps,
        turns=triton.cdiv(rows_a_split, steps * tile_rows), tile_channels=tile_channels,
        tile_groups=triton.next_power_of_2(groups),
        num_warps=sum_warps, **flags,
    )  # fmt: skip
    block = math.gcd(s.c_x, BLOCK) if s.c_skip else BLOCK
    met = min((block + s.size - 2) // s.size + 1, s.n_groups)  # groups, at most
    rows = min(WRITE_ROWS * BLOCK // block, triton.next_power_of_2(s.n_rows))
    blocks = triton.cdiv(s.c_x + s.c_skip, block)
    _group_norm_write[(triton.cdiv(s.n_rows, rows), blocks, s.batch)](
        *tensors, weight, bias, partial, out, s.n_rows, *channels, splits, eps,
        splits_pad=max(triton.next_power_of_2(splits), 16),
        tile_rows=rows, tile_channels=block, tile_groups=max(triton.next_power_of_2(met), 8),
        silu=silu, num_warps=warps or 4, **flags,
    )  # fmt: skip
