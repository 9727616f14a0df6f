"""The convexity loss on the GPU, forward and backward (methods.md D, Losses; G6).

Twin: sdi_fast/reference/convexity.py. The same maths in C++: csrc/math/convexity.h.

M = bilinear 8 x 8 map of the first two components (align_corners false, no antialias);
loss = -(sum [M(r, c) x M(r, c+1)]_3 + sum [M(r+1, c) x M(r, c)]_3) / (56 B), M = 0 beyond its edge.
Backward: with V(r, c+1) - V(r, c-1) + V(r-1, c) - V(r+1, c) =: K V, the sums' gradients at M are
K M_2 and -K M_1, and a pixel (y, x) gets sum_rc Y(y, r) X(x, c) of them, where Y(y, r) is the share
that pixel row y has in map row r, and X alike.

Mapping: forward, one program, which takes one view after the other: its 64 lanes are the map's
points, and each samples its right and lower neighbours itself. Backward, one program a view, which
resamples M and takes the 16 x 16 pixels that the taps of 8 rows and 8 columns meet in. Each gathers
from all map points through Y and X, so that taps that coincide (sides under 16) add up in one
place; where two taps name the same pixel, the first one writes it. No atomics: the same bits at
every run. The launcher zeroes the gradient, for the pixels that no tap touches.

Precision: f64 inside whatever the tensors are, rounded once at the end: the loss cancels, and 256
pixels cost nothing. The taps' shares are multiples of 1 / 16, in integers, thus exact.
Bytes: 256 pixels' first two components a view, read (and, backward, written, after the zero fill
of the whole map).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..constants import CONVEXITY_GRID

SIDE = tl.constexpr(CONVEXITY_GRID)  # of the map
PAIRS = tl.constexpr(CONVEXITY_GRID * (CONVEXITY_GRID - 1))  # of neighbours, a direction and view


@triton.jit
def _taps(i: tl.tensor, n: tl.tensor) -> tl.tuple:
    """Map row (or column) i (i64) of n pixels: its two pixels and the second one's share (f64)."""
    source = tl.maximum((2 * i + 1) * n - SIDE, 0)  # (i + .5) n / 8 - .5 in 16ths of a pixel
    low = source // (2 * SIDE)
    share = (source - 2 * SIDE * low).to(tl.float64) / (2 * SIDE)
    return low, tl.minimum(low + 1, n - 1), share


@triton.jit
def _sample(
    plane: tl.tensor,  # one component of a view [H, W, 3]
    r: tl.tensor,  # [8, 1] i64
    c: tl.tensor,  # [1, 8] i64
    height: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """The map of one component at (r, c), [8, 8] f64; 0 beyond the map."""
    inside = (r >= 0) & (r < SIDE) & (c >= 0) & (c < SIDE)
    top, bottom, down = _taps(r, height)
    left, right, along = _taps(c, width)
    top, bottom, left, right = 3 * top * width, 3 * bottom * width, 3 * left, 3 * right
    top_left = tl.load(plane + top + left, mask=inside, other=0.0).to(tl.float64)
    top_right = tl.load(plane + top + right, mask=inside, other=0.0).to(tl.float64)
    bottom_left = tl.load(plane + bottom + left, mask=inside, other=0.0).to(tl.float64)
    bottom_right = tl.load(plane + bottom + right, mask=inside, other=0.0).to(tl.float64)
    upper = top_left * (1.0 - along) + top_right * along
    lower = bottom_left * (1.0 - along) + bottom_right * along
    return upper * (1.0 - down) + lower * down


@triton.jit(do_not_specialize=("batch", "height", "width", "view_size"))
def _convexity_fwd(
    normals: tl.tensor,  # [B, H, W, 3], rows downwards
    loss: tl.tensor,  # scalar
    batch: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    view_size: tl.tensor,  # 3 H W
) -> None:
    r = tl.arange(0, SIDE).to(tl.int64)[:, None]
    c = tl.arange(0, SIDE).to(tl.int64)[None, :]
    total = tl.zeros([SIDE, SIDE], tl.float64)
    view = normals
    for _ in range(batch):
        x = _sample(view, r, c, height, width)
        y = _sample(view + 1, r, c, height, width)
        total += x * _sample(view + 1, r, c + 1, height, width)
        total -= y * _sample(view, r, c + 1, height, width)
        total += _sample(view, r + 1, c, height, width) * y
        total -= _sample(view + 1, r + 1, c, height, width) * x
        view += view_size
    tl.store(loss, -tl.sum(tl.sum(total, 1), 0) / (batch * PAIRS))


@triton.jit
def _curl(
    plane: tl.tensor, r: tl.tensor, c: tl.tensor, height: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """K V of the opening, [8, 8] f64."""
    right = _sample(plane, r, c + 1, height, width)
    left = _sample(plane, r, c - 1, height, width)
    above = _sample(plane, r - 1, c, height, width)
    below = _sample(plane, r + 1, c, height, width)
    return right - left + above - below


@triton.jit
def _pixel_of_tap(tap: tl.tensor, n: tl.tensor) -> tl.tensor:
    """Taps 2 i and 2 i + 1 are map row i's two pixels."""
    low, high, share = _taps(tap // 2, n)
    return tl.where(tap % 2 == 0, low, high)


@triton.jit
def _shares(n: tl.tensor) -> tl.tensor:
    """[16, 8] f64: the share that each tap's pixel has in each map row."""
    pixel = _pixel_of_tap(tl.arange(0, 2 * SIDE).to(tl.int64)[:, None], n)
    low, high, share = _taps(tl.arange(0, SIDE).to(tl.int64)[None, :], n)
    return tl.where(pixel == low, 1.0 - share, 0.0) + tl.where(pixel == high, share, 0.0)


@triton.jit
def _is_first(n: tl.tensor) -> tl.tensor:
    """[16]: whether no earlier tap names the same pixel."""
    tap = tl.arange(0, 2 * SIDE).to(tl.int64)[:, None]
    other = tl.arange(0, 2 * SIDE).to(tl.int64)[None, :]
    same = (_pixel_of_tap(tap, n) == _pixel_of_tap(other, n)) & (other < tap)
    return tl.sum(same.to(tl.int32), 1) == 0


@triton.jit
def _gather(map_grad: tl.tensor, in_rows: tl.tensor, in_columns: tl.tensor) -> tl.tensor:
    """[16, 16] f64: in_rows [16, 8] @ map_grad [8, 8] @ in_columns^T [8, 16], too small for dot."""
    by_row = tl.sum(in_rows[:, :, None] * map_grad[None, :, :], 1)
    return tl.sum(by_row[:, None, :] * in_columns[None, :, :], 2)


@triton.jit(do_not_specialize=("batch", "height", "width", "view_size"))
def _convexity_bwd(
    normals: tl.tensor,  # [B, H, W, 3]
    grad: tl.tensor,  # scalar: of the loss
    grad_normals: tl.tensor,  # [B, H, W, 3] zeroed
    batch: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    view_size: tl.tensor,  # 3 H W
) -> None:
    offset = tl.program_id(0).to(tl.int64) * view_size
    view = normals + offset
    r = tl.arange(0, SIDE).to(tl.int64)[:, None]
    c = tl.arange(0, SIDE).to(tl.int64)[None, :]
    scale = -tl.load(grad).to(tl.float64) / (batch * PAIRS)
    in_rows, in_columns = _shares(height), _shares(width)
    grad_x = _gather(scale * _curl(view + 1, r, c, height, width), in_rows, in_columns)
    grad_y = _gather(-scale * _curl(view, r, c, height, width), in_rows, in_columns)
    tap = tl.arange(0, 2 * SIDE).to(tl.int64)
    row, column = _pixel_of_tap(tap, height)[:, None], _pixel_of_tap(tap, width)[None, :]
    at = grad_normals + offset + 3 * (row * width + column)
    first = _is_first(height)[:, None] & _is_first(width)[None, :]
    tl.store(at, grad_x, mask=first)
    tl.store(at + 1, grad_y, mask=first)


def convexity_fwd(
    normals: Tensor,  # [B, H, W, 3] f32 or f64, at least one pixel
) -> Tensor:
    """The loss, a scalar."""
    normals, loss = normals.contiguous(), normals.new_empty(())
    with torch.cuda.device_of(normals):
        _convexity_fwd[(1,)](normals, loss, *_sizes(normals), num_warps=2)
    return loss


def convexity_bwd(
    normals: Tensor,  # [B, H, W, 3] f32 or f64, at least one pixel
    grad: Tensor,  # scalar: of the loss
) -> Tensor:
    """The gradient of normals, [B, H, W, 3]."""
    normals, grad_normals = normals.contiguous(), normals.new_zeros(normals.shape)
    with torch.cuda.device_of(normals):
        _convexity_bwd[(normals.shape[0],)](
            normals, grad, grad_normals, *_sizes(normals), num_warps=4
        )
    return grad_normals


def _sizes(normals: Tensor) -> tuple[int, int, int, int]:
    batch, height, width, _ = normals.shape
    return batch, height, width, 3 * height * width
