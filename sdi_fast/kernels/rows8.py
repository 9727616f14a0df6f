"""Rows in e4m3 with an f32 scale each, written where the activation is made; forward only.

Twins: sdi_fast/reference/rows8.py.

scale = amax / 448, values = y 448 / amax rounded to e4m3, amax the row's largest |y|, y in f32 and
never rounded before. y is x; or the layer norm of x + shift, after x += added, a product that is
yet to be added to the residual stream and so costs no pass of its own; or the GEGLU of x.

Mapping: programs hold whole rows in registers. A row's length is rounded up to a power of two: 5 of
8 lanes work at Stable Diffusion's widths. GEGLU's programs keep the bias and walk over some rows.
Bytes per element in f16: quantise_rows 2 read and 1 written; layer_norm8 likewise, with `added` 2
more read and 2 written; geglu8 4 read, 1 written. Conversion to e4m3 needs a compute capability of
8.9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import HAS_PTX, gelu
from .layer_norm import PROCESSORS, normalise, rows_of_a_program

E4M3_MAX = tl.constexpr(448.0)
PER_E4M3_MAX = tl.constexpr(1.0 / 448.0)
MIN_AMAX = tl.constexpr(1e-30)  # as in the twin
MAX_AMAX = tl.constexpr(3.4028234663852886e38)
GEGLU_ROWS = 8  # of a program, that share a bias
Rows8 = tuple[Tensor, Tensor]


@triton.jit
def _to_e4m3(y: tl.tensor) -> tl.tensor:
    """|y| <= 448 or a NaN, to nearest even."""
    if HAS_PTX:
        return y.to(tl.float8e4nv)
    # the interpreter's conversion loses carries and NaNs, but is exact for what e4m3 has
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (y + 24576.0) - 24576.0  # multiples of 2^-9
    return tl.where(tl.abs(y) < 0.015625, small, normal).to(tl.float8e4nv)


@triton.jit
def _store_rows(
    y: tl.tensor,  # [rows, block] f32, zeros beyond the columns
    values: tl.tensor,  # [M, K] e4m3
    scale: tl.tensor,  # [M]
    row: tl.tensor,  # [rows, 1] i64
    column: tl.tensor,  # [1, block]
    n_rows: tl.tensor,
    n_columns: tl.tensor,
) -> None:
    amax = tl.max(tl.abs(y), 1)[:, None]
    amax = tl.minimum(tl.maximum(amax, MIN_AMAX), MAX_AMAX)
    y = y * (E4M3_MAX / amax)
    # infinities, and a bit of 448 (1 + 2^-22); comparisons leave a NaN alone
    y = tl.where(y > E4M3_MAX, E4M3_MAX, y)
    y = tl.where(y < -E4M3_MAX, -E4M3_MAX, y)
    inside = (row < n_rows) & (column < n_columns)
    tl.store(values + row * n_columns + column, _to_e4m3(y), mask=inside)
    tl.store(scale + row, amax * PER_E4M3_MAX, mask=row < n_rows)


@triton.jit
def _quantise_rows(
    x: tl.tensor,  # [M, K]
    values: tl.tensor,  # [M, K] e4m3
    scale: tl.tensor,  # [M]
    n_rows: tl.tensor,
    n_columns: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    column = tl.arange(0, block)[None, :]
    inside = (row < n_rows) & (column < n_columns)
    y = tl.load(x + row * n_columns + column, mask=inside, other=0.0).to(tl.float32)
    _store_rows(y, values, scale, row, column, n_rows, n_columns)


@triton.jit
def _layer_norm8(
    x: tl.tensor,  # [M, C], updated where has_added
    added: tl.tensor,  # [M, C] where has_added
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    shift: tl.tensor,  # [C] where has_shift
    values: tl.tensor,  # [M, C] e4m3
    scale: tl.tensor,  # [M]
    n_rows: tl.tensor,
    eps: tl.tensor,
    n_channels: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
    has_shift: tl.constexpr,
    has_added: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    lane = tl.arange(0, block)
    inside = (row < n_rows) & (lane < n_channels)[None, :]
    at = row * n_channels + lane[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if has_added:
        value += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        kept = value.to(x.dtype.element_ty)
        tl.store(x + at, kept, mask=inside)
        value = kept.to(tl.float32)
    y = normalise(value, lane, weight, bias, shift, has_shift, n_channels, eps)
    _store_rows(y, values, scale, row, lane[None, :], n_rows, n_channels)


@triton.jit
def _geglu8(
    x: tl.tensor,  # [M, 2 F]
    bias: tl.tensor,  # [2 F]
    values: tl.tensor,  # [M, F] e4m3
    scale: tl.tensor,  # [M]
    n_rows: tl.tensor,
    n_columns: tl.constexpr,  # F
    block: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    lane = tl.arange(0, block)
    real = lane < n_columns
    bias_value = tl.load(bias + lane, mask=real, other=0.0).to(tl.float32)[None, :]
    bias_gate = tl.load(bias + n_columns + lane, mask=real, other=0.0).to(tl.float32)[None, :]
    column = lane[None, :]
    for i in range(rows):
        row = tl.program_id(0).to(tl.int64) * rows + i + tl.arange(0, 1)[:, None]
        inside = (row < n_rows) & real[None, :]
        at = x + row * (2 * n_columns) + column
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32) + bias_value
        gate = tl.load(at + n_columns, mask=inside, other=0.0).to(tl.float32) + bias_gate
        _store_rows(value * gelu(gate), values, scale, row, column, n_rows, n_columns)


def _empty(like: Tensor, n_columns: int) -> Rows8:
    values = like.new_empty((like.shape[0], n_columns), dtype=torch.float8_e4m3fn)
    return values, like.new_empty((like.shape[0], 1), dtype=torch.float32)


def quantise_rows(
    x: Tensor,  # [M, K] contiguous
) -> Rows8:
    """Values [M, K] e4m3 and scale [M, 1] f32."""
    n_rows, n_columns = x.shape
    values, scale = _empty(x, n_columns)
    if values.numel() == 0:
        return values, scale
    block = triton.next_power_of_2(n_columns)
    rows = rows_of_a_program(n_rows, block)
    with torch.cuda.device_of(x):
        _quantise_rows[(triton.cdiv(n_rows, rows),)](
            x, values, scale, n_rows, n_columns=n_columns, block=block, rows=rows, num_warps=4,
        )  # fmt: skip
    return values, scale


def layer_norm8(
    x: Tensor,  # [M, C] contiguous, updated where `added` is given
    added: Tensor | None,  # [M, C] contiguous
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    shift: Tensor | None,  # [C]
    *,
    eps: float,
) -> Rows8:
    """Values [M, C] e4m3 and scale [M, 1] f32."""
    n_rows, c = x.shape
    values, scale = _empty(x, c)
    if values.numel() == 0:
        return values, scale
    block = triton.next_power_of_2(c)
    rows = rows_of_a_program(n_rows, block)
    with torch.cuda.device_of(x):
        _layer_norm8[(triton.cdiv(n_rows, rows),)](
            x, x if added is None else added, weight, bias, x if shift is None else shift,
            values, scale, n_rows, eps, n_channels=c, block=block, rows=rows,
            has_shift=shift is not None, has_added=added is not None, num_warps=4,
        )  # fmt: skip
    return values, scale


def geglu8(
    x: Tensor,  # [M, 2 F] contiguous
    bias: Tensor,  # [2 F]
) -> Rows8:
    """Values [M, F] e4m3 and scale [M, 1] f32."""
    n_rows, n_columns = x.shape[0], x.shape[1] // 2
    values, scale = _empty(x, n_columns)
    if values.numel() == 0:
        return values, scale
    block = triton.next_power_of_2(n_columns)
    rows = GEGLU_ROWS
    while rows > 1 and triton.cdiv(n_rows, rows) < 2 * PROCESSORS:
        rows //= 2
    warps = max(1, min(16, block // 512))  # 16 values and 16 gates a thread
    with torch.cuda.device_of(x):
        _geglu8[(triton.cdiv(n_rows, rows),)](
            x, bias, values, scale, n_rows,
            n_columns=n_columns, block=block, rows=rows, num_warps=warps,
        )  # fmt: skip
    return values, scale
