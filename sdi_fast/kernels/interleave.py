"""Puts the four phases of an upsampling convolution in their places, forward only.

Twin: interleave_phases of sdi_fast/reference/unet_ops.py.

out[b, 2 i + p, 2 j + q, c] = x[b, i + p, j + q, (p, q), c]. Mapping: a program copies `block`
channels of `rows` output pixels. Bytes per result in f16: 2 read, 2 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _interleave(
    x: tl.tensor,  # [B, H + 1, W + 1, 4, C]
    out: tl.tensor,  # [B, 2 H, 2 W, C]
    n_pixels: tl.tensor,  # B * 2 H * 2 W
    height: tl.tensor,  # 2 H
    width: tl.tensor,  # 2 W
    n_channels: tl.tensor,
    block: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    channel = tl.program_id(1) * block + tl.arange(0, block)[None, :]
    inside = (pixel < n_pixels) & (channel < n_channels)
    column = pixel % width
    row = (pixel // width) % height
    sample = pixel // (width * height)
    i = row // 2 + row % 2
    j = column // 2 + column % 2
    source = (sample * (height // 2 + 1) + i) * (width // 2 + 1) + j
    source = source * 4 + (row % 2) * 2 + column % 2
    value = tl.load(x + source * n_channels + channel, mask=inside, other=0.0)
    tl.store(out + pixel * n_channels + channel, value, mask=inside)


def interleave_phases(
    x: Tensor,  # [B, H + 1, W + 1, 4 C] contiguous
) -> Tensor:
    """[B, 2 H, 2 W, C]."""
    b, h, w, c = x.shape[0], 2 * (x.shape[1] - 1), 2 * (x.shape[2] - 1), x.shape[3] // 4
    out = x.new_empty((b, h, w, c))
    if out.numel() == 0:
        return out
    block, rows = min(128, triton.next_power_of_2(c)), 16
    grid = (triton.cdiv(b * h * w, rows), triton.cdiv(c, block))
    with torch.cuda.device_of(x):
        _interleave[grid](x, out, b * h * w, h, w, c, block=block, rows=rows, num_warps=4)
    return out
