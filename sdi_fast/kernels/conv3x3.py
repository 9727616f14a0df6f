"""3 x 3 convolution, stride 1, padding 1, of channels-last images as an implicit matrix product.

Twin: conv3x3 of sdi_fast/reference/unet_ops.py.

out[p, f] = residual[p, f] + sum over taps k and channels c of x[p + offset(k), c] w[f, k, c]: a
product of B H W rows by 9 C columns whose left side is never written down. Mapping: a program holds
an accumulator of block_m pixels x block_n filters and walks taps and blocks of channels; pixels
beyond the border are read as zeros. With splits > 1 that many programs share the walk, leave f32
sums and a second kernel adds them up: small images have too few tiles to fill the GPU (8 x 8 of 4
samples and 1280 filters: 20 of 128 x 128, for 132 processors).

Sums in f32, one rounding. The residual costs one read.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_geglu import GROUP_M, tile_of

PROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True)
class ConvTile:
    """How the product is cut up."""

    block_m: int
    block_n: int
    block_k: int = 64
    splits: int = 1
    warps: int = 8
    stages: int = 3

    def __str__(self) -> str:
        size = f"{self.block_m}x{self.block_n}x{self.block_k}/{self.splits}"
        return f"{size} {self.warps} warps {self.stages} stages"


# programs that fit on a processor at once; tensor cores' relative speed, as shared memory allows
SHAPES = (
    (ConvTile(128, 256, stages=3), 1, 1.0),
    (ConvTile(128, 128, stages=3), 2, 0.95),
    (ConvTile(128, 64, warps=4, stages=4), 2, 0.75),
)
SPLITS = (1, 2, 3, 4, 6, 8)
START = 6  # steps that a program's start and end cost
SPLIT_COST = 0.15  # of adding up splits, in steps a 1000 results of a processor's share each


@functools.cache
def conv_tiles(n_pixels: int, n_filters: int, n_channels: int) -> tuple[ConvTile, ...]:
    """Tiles worth measuring, the likeliest first: of each shape the best number of splits."""
    costs: dict[ConvTile, float] = {}
    for shape, together, speed in SHAPES:
        tiles = triton.cdiv(n_pixels, shape.block_m) * triton.cdiv(n_filters, shape.block_n)
        steps = 9 * triton.cdiv(n_channels, shape.block_k)
        options = {}
        for splits in SPLITS:
            if splits > 1 and (steps < 8 * splits or tiles * splits > 4 * PROCESSORS):
                continue
            # steps of the busiest processor, in units of 128 x 128 results
            turns = math.ceil(tiles * splits / (PROCESSORS * together))
            shared = min(together, tiles * splits / PROCESSORS)  # programs beside each other
            size = shape.block_m * shape.block_n / 2**14
            product = turns * max(shared, 1.0) * size / speed * (steps / splits + START)
            sums = splits * n_pixels * n_filters / PROCESSORS / 1000 if splits > 1 else 0.0
            options[replace(shape, splits=splits)] = product + SPLIT_COST * sums
        tile = min(options, key=lambda t: options[t])
        costs[tile] = options[tile]
    return tuple(sorted(costs, key=lambda t: costs[t]))


@triton.jit(do_not_specialize=("n_pixels", "height", "width", "steps_a_split"))
def _conv3x3(
    x: tl.tensor,  # [B, H, W, C]
    weight: tl.tensor,  # [F, 9, C]
    residual: tl.tensor,  # [B, H, W, F] where has_residual
    out: tl.tensor,  # [B, H, W, F], or [splits, B, H, W, F] f32
    n_pixels: tl.tensor,  # B H W
    height: tl.tensor,
    width: tl.tensor,
    n_channels: tl.tensor,
    n_filters: tl.tensor,
    steps_a_split: tl.tensor,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
    even_c: tl.constexpr,
    has_residual: tl.constexpr,
    is_split: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    n_m, n_n = tl.cdiv(n_pixels, block_m), tl.cdiv(n_filters, block_n)
    m, n = tile_of(tl.program_id(0), n_m, n_n, group_m)
    pixel = m * block_m + tl.arange(0, block_m)
    filter_ = n * block_n + tl.arange(0, block_n)
    inner = tl.arange(0, block_k)
    px = pixel % width
    py = (pixel // width) % height
    left = x + pixel.to(tl.int64)[:, None] * n_channels + inner[None, :]
    # filters beyond the end read some real one and are not stored
    right = weight + (filter_ % n_filters).to(tl.int64)[None, :] * (9 * n_channels) + inner[:, None]
    blocks = tl.cdiv(n_channels, block_k)  # of channels
    first = tl.program_id(1) * steps_a_split
    last = tl.minimum(first + steps_a_split, 9 * blocks)
    total = tl.zeros([block_m, block_n], tl.float32)
    for step in range(first, last):
        tap = step // blocks
        start = (step - tap * blocks) * block_k
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        inside = (py + dy >= 0) & (py + dy < height) & (px + dx >= 0) & (px + dx < width)
        inside = inside & (pixel < n_pixels)
        from_x = left + ((dy * width + dx) * n_channels + start)
        from_weight = right + (tap * n_channels + start)
        if even_c:
            a = tl.load(from_x, mask=inside[:, None], other=0.0)
            b = tl.load(from_weight)
        else:
            real = inner < n_channels - start
            a = tl.load(from_x, mask=inside[:, None] & real[None, :], other=0.0)
            b = tl.load(from_weight, mask=real[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=precision)
    stored = (pixel < n_pixels)[:, None] & (filter_ < n_filters)[None, :]
    at = pixel.to(tl.int64)[:, None] * n_filters + filter_[None, :]
    if has_residual:
        total += tl.load(residual + at, mask=stored, other=0.0).to(tl.float32)
    if is_split:
        at += tl.program_id(1).to(tl.int64) * n_pixels * n_filters
    tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _add_splits(
    partial: tl.tensor,  # [splits, n] f32
    residual: tl.tensor,  # [n] where has_residual
    out: tl.tensor,  # [n]
    n: tl.tensor,
    splits: tl.constexpr,
    has_residual: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    total = tl.zeros([block], tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(partial + split * n.to(tl.int64) + at, mask=inside, other=0.0)
    if has_residual:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def split_steps(steps: int, splits: int, out: Tensor) -> tuple[int, int, Tensor]:
    """Steps a split, how many splits that makes, and where the kernel writes."""
    steps_a_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, steps_a_split)  # none is empty
    target = out if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32)
    return steps_a_split, splits, target


def add_splits(
    partial: Tensor,  # [splits, *out.shape] f32
    residual: Tensor,  # like out; anything where there is none
    out: Tensor,
    *,
    has_residual: bool,
) -> None:
    """out = sum of the splits' results, plus the residual."""
    n, block = out.numel(), 1024
    _add_splits[(triton.cdiv(n, block),)](
        partial, residual, out, n, splits=len(partial), has_residual=has_residual,
        block=block, num_warps=4,
    )  # fmt: skip


def conv3x3(
    x: Tensor,  # [B, H, W, C] contiguous
    weight: Tensor,  # [F, 3, 3, C] contiguous
    residual: Tensor | None,  # [B, H, W, F] contiguous
    tile: ConvTile | None = None,
) -> Tensor:
    """[B, H, W, F]."""
    b, h, w, c = x.shape
    f, n_pixels = weight.shape[0], b * h * w
    out = x.new_empty((b, h, w, f))
    if out.numel() == 0:
        return out
    tile = tile or conv_tiles(n_pixels, f, c)[0]
    steps = 9 * triton.cdiv(c, tile.block_k)
    steps_a_split, splits, target = split_steps(steps, tile.splits, out)
    other = x if residual is None else residual
    grid = (triton.cdiv(n_pixels, tile.block_m) * triton.cdiv(f, tile.block_n), splits)
    with torch.cuda.device_of(x):
        _conv3x3[grid](
            x, weight, other, target, n_pixels, h, w, c, f, steps_a_split,
            block_m=tile.block_m, block_n=tile.block_n, block_k=tile.block_k, group_m=GROUP_M,
            even_c=c % tile.block_k == 0, has_residual=residual is not None and splits == 1,
            is_split=splits > 1, precision="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            add_splits(target, other, out, has_residual=residual is not None)
    return out
