"""Layer norm of [M, C] rows with a pending bias, forward only.

Twin: layer_norm of sdi_fast/reference/unet_ops.py.

y = (x + shift - mean) rstd weight + bias over C. Mapping: a program holds `rows` whole rows in
registers, a warp or less each; one read, one write, mean first and then the deviations, in f32.
Bytes per element in f16: 2 read, 2 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROCESSORS = 132  # of an H100 or H200


@triton.jit
def normalise(
    value: tl.tensor,  # [rows, block] f32
    lane: tl.tensor,  # [block]
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    shift: tl.tensor,  # [C] where has_shift, added first
    has_shift: tl.constexpr,
    n_channels: tl.constexpr,
    eps: tl.tensor,
) -> tl.tensor:
    """Rows normalised; zeros beyond the columns."""
    real = lane < n_channels
    w = tl.load(weight + lane, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + lane, mask=real, other=0.0).to(tl.float32)
    if has_shift:
        value += tl.load(shift + lane, mask=real, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(value, 1)[:, None] / n_channels
    off = tl.where(real[None, :], value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1)[:, None] / n_channels + eps)
    return off * rstd * w[None, :] + b[None, :]


@triton.jit
def _layer_norm(
    x: tl.tensor,  # [M, C]
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    shift: tl.tensor,  # [C] where has_shift
    out: tl.tensor,  # [M, C]
    n_rows: tl.tensor,
    eps: tl.tensor,
    n_channels: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
    has_shift: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    lane = tl.arange(0, block)  # in one dimension: else Triton moves x from layout to layout
    inside = (row < n_rows) & (lane < n_channels)[None, :]
    at = row * n_channels + lane[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y = normalise(value, lane, weight, bias, shift, has_shift, n_channels, eps)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def rows_of_a_program(n_rows: int, block: int) -> int:
    """As many as a program's registers hold, so that they share weight, bias and shift, but few
    enough to keep all processors busy."""
    rows = max(1, min(8, 4096 // block))
    while rows > 1 and triton.cdiv(n_rows, rows) < 2 * PROCESSORS:
        rows //= 2
    return rows


def layer_norm(
    x: Tensor,  # [M, C] contiguous
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    shift: Tensor | None,  # [C]
    *,
    eps: float,
) -> Tensor:
    """[M, C]."""
    n_rows, c = x.shape
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(c)
    rows = rows_of_a_program(n_rows, block)
    with torch.cuda.device_of(x):
        _layer_norm[(triton.cdiv(n_rows, rows),)](
            x, weight, bias, x if shift is None else shift, out, n_rows, eps,
            n_channels=c, block=block, rows=rows, has_shift=shift is not None, num_warps=4,
        )  # fmt: skip
    return out
