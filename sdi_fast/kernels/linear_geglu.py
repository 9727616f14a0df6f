"""A linear map with GEGLU in its epilogue, forward only.

Twin: linear_geglu of sdi_fast/reference/unet_ops.py.

y = (x Wv^T + b_v) gelu(x Wg^T + b_g) for W = [Wv; Wg]. Mapping: a program holds two accumulators of
block_m x block_n, values and gates, which share the tile of x; programs walk the result in bands of
GROUP_M row blocks, so that a band's tiles of x and W stay in L2. Sums in f32. What is saved against
a product and a pass: 8 bytes written and read per result in f16.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

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
    tma: bool = False  # tiles come by Hopper's copy engine rather than by threads' addresses

    def __str__(self) -> str:
        size = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{size} {self.warps} warps {self.stages} stages{' TMA' if self.tma else ''}"


# Two programs a processor (96 KiB of 227, 8 warps of 107 registers each): one's epilogue, whose
# gelu takes as long as 2 blocks of the product, runs beside the other's product.
PAIRED = Tile(128, 64)
# One program a processor, whose product reads less: 48 KiB rather than 64 for as many results.
SINGLE = Tile(128, 128, stages=4)
SMALL = Tile(64, 64, warps=4, stages=4)


@functools.cache
def geglu_tiles(n_rows: int, n_inner: int, tma: bool) -> tuple[Tile, ...]:
    """Tiles worth measuring, the likeliest first: the epilogue weighs more with a short n_inner."""
    tiles = [PAIRED, SINGLE] if n_inner < 1024 else [SINGLE, PAIRED]
    if n_rows <= 64:
        tiles = [SMALL, PAIRED]
    elif n_rows <= 512:
        tiles.append(SMALL)
    return tuple(replace(tile, tma=tma) for tile in tiles)


@triton.jit
def tile_of(program: tl.tensor, n_m: tl.tensor, n_n: tl.tensor, group_m: tl.constexpr) -> tl.tuple:
    """Row and column block of a program: bands of group_m row blocks, column by column."""
    band = program // (group_m * n_n)
    first = band * group_m
    height = tl.minimum(n_m - first, group_m)
    inside = program - band * (group_m * n_n)
    return first + inside % height, inside // height


@triton.jit
def _finish(
    value: tl.tensor,  # [block_m, block_n] f32
    gate: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    n_rows: tl.tensor,
    n_columns: tl.tensor,
    row: tl.tensor,  # [block_m]
    column: tl.tensor,  # [block_n]
) -> None:
    """Biases, gate, store."""
    real = column < n_columns
    value += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + n_columns + column, mask=real, other=0.0).to(tl.float32)[None, :]
    y = value * gelu(gate)
    at = out + row.to(tl.int64)[:, None] * n_columns + column[None, :]
    inside = (row < n_rows)[:, None] & real[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("n_rows",))
def _linear_geglu(
    x: tl.tensor,  # [M, K]
    weight: tl.tensor,  # [2 F, K]
    bias: tl.tensor,  # [2 F]
    out: tl.tensor,  # [M, F]
    n_rows: tl.tensor,  # M
    n_columns: tl.tensor,  # F
    n_inner: tl.tensor,  # K
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
    even_k: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    n_m, n_n = tl.cdiv(n_rows, block_m), tl.cdiv(n_columns, block_n)
    m, n = tile_of(tl.program_id(0), n_m, n_n, group_m)
    row = m * block_m + tl.arange(0, block_m)
    column = n * block_n + tl.arange(0, block_n)
    inner = tl.arange(0, block_k)
    # rows and columns beyond the end read some real one and are not stored
    left = x + (row % n_rows).to(tl.int64)[:, None] * n_inner + inner[None, :]
    right = weight + (column % n_columns).to(tl.int64)[None, :] * n_inner + inner[:, None]
    gates = weight + (n_columns + column % n_columns).to(tl.int64)[None, :] * n_inner
    gates += inner[:, None]
    value = tl.zeros([block_m, block_n], tl.float32)
    gate = tl.zeros([block_m, block_n], tl.float32)
    for start in range(0, n_inner, block_k):
        if even_k:
            a = tl.load(left + start)
            v = tl.load(right + start)
            g = tl.load(gates + start)
        else:
            real = inner < n_inner - start
            a = tl.load(left + start, mask=real[None, :], other=0.0)
            v = tl.load(right + start, mask=real[:, None], other=0.0)
            g = tl.load(gates + start, mask=real[:, None], other=0.0)
        value = tl.dot(a, v, value, input_precision=precision)
        gate = tl.dot(a, g, gate, input_precision=precision)
    _finish(value, gate, bias, out, n_rows, n_columns, row, column)


@triton.jit(do_not_specialize=("n_rows",))
def _linear_geglu_tma(
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
    _finish(value, gate, bias, out, n_rows, n_columns, row, column)


def linear_geglu(
    x: Tensor,  # [M, K] contiguous
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
    sizes = (n_rows, n_columns, n_inner)
    common = dict(
        block_m=tile.block_m,
        block_n=tile.block_n,
        block_k=tile.block_k,
        group_m=GROUP_M,
        precision="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    with torch.cuda.device_of(x):
        if tile.tma:
            left = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
            right = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
            _linear_geglu_tma[grid](left, right, bias, out, *sizes, **common)
        else:
            even = n_inner % tile.block_k == 0
            _linear_geglu[grid](x, weight, bias, out, *sizes, even_k=even, **common)
    return out
