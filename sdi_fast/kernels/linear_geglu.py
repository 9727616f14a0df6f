"""A linear map with GEGLU in its epilogue, forward only.

Twin: linear_geglu of sdi_fast/reference/unet_ops.py.

y = (x Wv^T + b_v) gelu(x Wg^T + b_g) for W = [Wv; Wg]. Mapping: a program holds two accumulators of
block_m x block_n, values and gates, which share the tile of x; programs walk the result in bands of
GROUP_M row blocks, so that a band's tiles of x and W stay in L2. Tiles come by the copy engine
(TMA, Hopper and later), which wants rows of a multiple of 16 bytes. Sums in f32. What is saved
against a product and a pass: 8 bytes written and read per result in f16.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .activations import gelu

GROUP_M = 8


@dataclass(frozen=True)
class Tile:
    """How a product is cut up."""

    block_m: int
    block_n: int
    block_k: int = 64
    warps: int = 8
    stages: int = 3

    def __str__(self) -> str:
        size = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{size} {self.warps} warps {self.stages} stages"


# Two programs a processor (96 KiB of 227, 8 warps of 107 registers each): one's epilogue, whose
# gelu takes as long as 2 blocks of the product, runs beside the other's product.
PAIRED = Tile(128, 64)
# One program a processor, whose product reads less: 48 KiB rather than 64 for as many results.
SINGLE = Tile(128, 128, stages=4)
SMALL = Tile(64, 64, warps=4, stages=4)


@functools.cache
def geglu_tiles(n_rows: int, n_inner: int) -> tuple[Tile, ...]:
    """Tiles worth measuring, the likeliest first: the epilogue weighs more with a short n_inner."""
    tiles = [PAIRED, SINGLE] if n_inner < 1024 else [SINGLE, PAIRED]
    if n_rows <= 64:
        tiles = [SMALL, PAIRED]
    elif n_rows <= 512:
        tiles.append(SMALL)
    return tuple(tiles)


@triton.jit
def tile_of(program: tl.tensor, n_m: tl.tensor, n_n: tl.tensor, group_m: tl.constexpr) -> tl.tuple:
    """Row and column block of a program: bands of group_m row blocks, column by column."""
    band = program // (group_m * n_n)
    first = band * group_m
    height = tl.minimum(n_m - first, group_m)
    inside = program - band * (group_m * n_n)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=("n_rows",))
def _linear_geglu(
    x: tl.tensor,  # descriptor of [M, K]
    weight: tl.tensor,  # descriptor of [2 F, K]
    bias: tl.tensor,  # [2 F]
    out: tl.tensor,  # [M, F]
    n_rows: tl.tensor,  # M
    n_columns: tl.tensor,  # F
    n_inner: tl.tensor,  # K
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    n_m, n_n = tl.cdiv(n_rows, block_m), tl.cdiv(n_columns, block_n)
    m, n = tile_of(tl.program_id(0), n_m, n_n, group_m)
    value = tl.zeros([block_m, block_n], tl.float32)
    gate = tl.zeros([block_m, block_n], tl.float32)
    for start in range(0, n_inner, block_k):  # zeros come from beyond the ends
        a = x.load([m * block_m, start])
        v = weight.load([n * block_n, start])
        g = weight.load([n_columns + n * block_n, start])
        value = tl.dot(a, v.T, value, input_precision=precision)
        gate = tl.dot(a, g.T, gate, input_precision=precision)
    row = m * block_m + tl.arange(0, block_m)
    column = n * block_n + tl.arange(0, block_n)
    real = column < n_columns
    value += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + n_columns + column, mask=real, other=0.0).to(tl.float32)[None, :]
    y = value * gelu(gate)
    at = out + row.to(tl.int64)[:, None] * n_columns + column[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(row < n_rows)[:, None] & real[None, :])


def linear_geglu(
    x: Tensor,  # [M, K] contiguous, rows of a multiple of 16 bytes
    weight: Tensor,  # [2 F, K] contiguous
    bias: Tensor,  # [2 F]
    tile: Tile | None = None,
) -> Tensor:
    """[M, F]."""
    tile = tile or PAIRED
    n_rows, n_inner = x.shape
    n_columns = weight.shape[0] // 2
    out = x.new_empty((n_rows, n_columns))
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(n_rows, tile.block_m) * triton.cdiv(n_columns, tile.block_n),)
    left = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
    right = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
    with torch.cuda.device_of(x):
        _linear_geglu[grid](
            left, right, bias, out, n_rows, n_columns, n_inner,
            block_m=tile.block_m, block_n=tile.block_n, block_k=tile.block_k, group_m=GROUP_M,
            precision="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
