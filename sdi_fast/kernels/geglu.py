"""GEGLU of a linear map's output, bias and gate in one pass, forward only.

Twin: geglu of sdi_fast/reference/unet_ops.py.

y = (v + b_v) gelu(g + b_g) for x = [v, g], gelu(g) = g / 2 (1 + erf(g / sqrt 2)), in f32. Mapping:
a program takes `block` columns of `rows` rows. Bytes per result in f16: 4 read, 2 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import gelu


@triton.jit
def _geglu(
    x: tl.tensor,  # [M, 2 F]
    bias: tl.tensor,  # [2 F]
    out: tl.tensor,  # [M, F]
    n_rows: tl.tensor,
    n_columns: tl.tensor,  # F
    block: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    lane = tl.program_id(1) * block + tl.arange(0, block)
    column = lane[None, :]
    inside = (row < n_rows) & (column < n_columns)
    at = x + row * (2 * n_columns) + column
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(at + n_columns, mask=inside, other=0.0).to(tl.float32)
    # in one dimension: else Triton moves x, not these, from one layout to another
    value += tl.load(bias + lane, mask=lane < n_columns, other=0.0).to(tl.float32)[None, :]
    at_gate = bias + n_columns + lane
    gate += tl.load(at_gate, mask=lane < n_columns, other=0.0).to(tl.float32)[None, :]
    y = value * gelu(gate)
    tl.store(out + row * n_columns + column, y.to(out.dtype.element_ty), mask=inside)


def geglu(
    x: Tensor,  # [M, 2 F] contiguous
    bias: Tensor,  # [2 F]
) -> Tensor:
    """[M, F]."""
    n_rows, n_columns = x.shape[0], x.shape[1] // 2
    out = x.new_empty((n_rows, n_columns))
    if out.numel() == 0:
        return out
    block, rows = min(128, triton.next_power_of_2(n_columns)), 16
    grid = (triton.cdiv(n_rows, rows), triton.cdiv(n_columns, block))
    with torch.cuda.device_of(x):
        _geglu[grid](x, bias, out, n_rows, n_columns, block=block, rows=rows, num_warps=4)
    return out
