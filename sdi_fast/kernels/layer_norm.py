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
    channel = tl.arange(0, block)[None, :]
    real = channel < n_channels
    inside = (row < n_rows) & real
    value = tl.load(x + row * n_channels + channel, mask=inside, other=0.0).to(tl.float32)
    if has_shift:
        value += tl.load(shift + channel, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1)[:, None] / n_channels
    off = tl.where(real, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1)[:, None] / n_channels + eps)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    y = off * rstd * w + b
    tl.store(out + row * n_channels + channel, y.to(out.dtype.element_ty), mask=inside)


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
    rows = max(1, min(4, 4096 // block))
    with torch.cuda.device_of(x):
        _layer_norm[(triton.cdiv(n_rows, rows),)](
            x, weight, bias, x if shift is None else shift, out, n_rows, eps,
            n_channels=c, block=block, rows=rows, has_shift=shift is not None, num_warps=4,
        )  # fmt: skip
    return out
