"""3 x 3 convolution on images with a margin of zeros, fed by Hopper's copy engine (TMA).

Twin: conv3x3_padded of sdi_fast/reference/unet_ops.py.

x is [B, H + 1, W + 1, C] with zeros in the last row and column, as group_norm writes it on demand.
In its flat list of pixels the neighbour of every pixel lies at a constant distance: one to the left
of a row's first pixel is the zero that ends the row before, and one above an image the row that
ends the image before. What lies before the first image is out of the copy engine's bounds and read
as zero. So each step of a tap is a plain tile of [block_m, block_k], copied without a thread that
computes addresses and masks, as conv3x3.py has to.

Mapping, splits and precision as in conv3x3.py. The zeros' results are computed and not stored: 3%
more work at 64 x 64, 6% at 32 x 32, 13% at 16 x 16, 27% at 8 x 8.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .conv3x3 import ConvTile, add_splits, conv_tiles, split_steps
from .linear_geglu import GROUP_M, tile_of


@functools.cache
def padded_tiles(batch: int, height: int, width: int, filters: int, channels: int) -> tuple:
    """Tiles worth measuring; () where the channels do not come in whole blocks."""
    n_pixels = batch * (height + 1) * (width + 1)
    return tuple(t for t in conv_tiles(n_pixels, filters, channels) if channels % t.block_k == 0)


@triton.jit(do_not_specialize=("n_pixels", "height", "width", "steps_a_split"))
def _conv3x3_padded(
    x: tl.tensor,  # descriptor of [B (H + 1) (W + 1), C]
    weight: tl.tensor,  # descriptor of [F, 9 C]
    residual: tl.tensor,  # [B, H, W, F] where has_residual
    out: tl.tensor,  # [B, H, W, F], or [splits, B, H, W, F] f32
    n_pixels: tl.tensor,  # B (H + 1) (W + 1)
    height: tl.tensor,  # H
    width: tl.tensor,  # W
    n_channels: tl.tensor,
    n_filters: tl.tensor,
    steps_a_split: tl.tensor,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
    has_residual: tl.constexpr,
    is_split: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    n_m, n_n = tl.cdiv(n_pixels, block_m), tl.cdiv(n_filters, block_n)
    m, n = tile_of(tl.program_id(0), n_m, n_n, group_m)
    blocks = n_channels // block_k
    first = tl.program_id(1) * steps_a_split
    last = tl.minimum(first + steps_a_split, 9 * blocks)
    total = tl.zeros([block_m, block_n], tl.float32)
    for step in range(first, last):
        tap = step // blocks
        start = (step - tap * blocks) * block_k
        ahead = (tap // 3 - 1) * (width + 1) + tap % 3 - 1
        a = x.load([m * block_m + ahead, start])
        b = weight.load([n * block_n, tap * n_channels + start])
        total = tl.dot(a, b.T, total, input_precision=precision)
    pixel = m * block_m + tl.arange(0, block_m)
    filter_ = n * block_n + tl.arange(0, block_n)
    px = pixel % (width + 1)
    line = pixel // (width + 1)
    py = line % (height + 1)
    real = (pixel < n_pixels) & (px < width) & (py < height)
    row = (line // (height + 1) * height + py).to(tl.int64) * width + px
    stored = real[:, None] & (filter_ < n_filters)[None, :]
    at = row[:, None] * n_filters + filter_[None, :]
    if has_residual:
        total += tl.load(residual + at, mask=stored, other=0.0).to(tl.float32)
    if is_split:
        n_images = n_pixels // ((height + 1) * (width + 1))
        at += tl.program_id(1).to(tl.int64) * n_images * height * width * n_filters
    tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)


def conv3x3_padded(
    x: Tensor,  # [B, H + 1, W + 1, C] contiguous; zeros in the last row and column
    weight: Tensor,  # [F, 3, 3, C] contiguous
    residual: Tensor | None,  # [B, H, W, F] contiguous
    tile: ConvTile | None = None,
) -> Tensor:
    """[B, H, W, F]."""
    b, h, w, c = x.shape[0], x.shape[1] - 1, x.shape[2] - 1, x.shape[3]
    f = weight.shape[0]
    out = x.new_empty((b, h, w, f))
    if out.numel() == 0:
        return out
    tile = tile or ConvTile(128, 128, stages=3)
    steps = 9 * c // tile.block_k
    steps_a_split, splits, target = split_steps(steps, tile.splits, out)
    other = x if residual is None else residual
    n_pixels = b * (h + 1) * (w + 1)
    images = TensorDescriptor.from_tensor(x.view(n_pixels, c), [tile.block_m, tile.block_k])
    filters = TensorDescriptor.from_tensor(weight.view(f, 9 * c), [tile.block_n, tile.block_k])
    grid = (triton.cdiv(n_pixels, tile.block_m) * triton.cdiv(f, tile.block_n), splits)
    with torch.cuda.device_of(x):
        _conv3x3_padded[grid](
            images, filters, other, target, n_pixels, h, w, c, f, steps_a_split,
            block_m=tile.block_m, block_n=tile.block_n, block_k=tile.block_k, group_m=GROUP_M,
            has_residual=residual is not None and splits == 1, is_split=splits > 1,
            precision="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            add_splits(target, other, out, has_residual=residual is not None)
    return out
