"""Multiresolution hash encoding in tiny-cuda-nn's layout (methods.md D, Geometry).

Twin of ops/hash_encode.py. Level l maps x in [0, 1]^3 to pos = x * scale_l + 0.5, mixes the eight
corners of pos's cell trilinearly, and reads entry (level offset + index) * F + f of the table.
The index is x + y R + z R^2 modulo the level's size where the level is dense, else the XOR of
coordinate * prime in 32-bit arithmetic modulo the size. At a face of the box a corner may lie one
past R: tiny-cuda-nn lets it wrap into the next row, and so does this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import HASH_PRIMES
from ..types import HashGridSpec


def hash_encode(
    x: Tensor,  # [N, 3] in [0, 1]
    table: Tensor,  # [spec.n_params]
    spec: HashGridSpec,
    active_levels: int,  # levels >= this give zeros and are skipped
) -> Tensor:  # [N, L * F]
    """Features of x, level-major. Differentiable, twice, in `x` and `table`."""
    levels = []
    for level, entries in _active(table, spec, active_levels):
        index, offset = _corners(x, spec, level)
        levels.append(_mix(_weights(*_axis_weights(offset)), entries[index]))
    return _pad(levels, x, spec)


def hash_encode_with_jacobian(
    x: Tensor,  # [N, 3] in [0, 1]
    table: Tensor,  # [spec.n_params]
    spec: HashGridSpec,
    active_levels: int,
) -> tuple[Tensor, Tensor]:  # [N, L * F], [N, L * F, 3]
    """Features and their derivative by x, both linear in `table` and differentiable in it."""
    levels, jacobians = [], []
    for level, entries in _active(table, spec, active_levels):
        index, offset = _corners(x, spec, level)
        values = entries[index]  # [8, N, F]
        wx, wy, wz = _axis_weights(offset)
        levels.append(_mix(_weights(wx, wy, wz), values))
        slope = torch.stack([-torch.ones_like(wx[0]), torch.ones_like(wx[0])])
        slope = slope * spec.scales[level]  # d(1 - o, o)/dx
        parts = [(slope, wy, wz), (wx, slope, wz), (wx, wy, slope)]
        jacobians.append(torch.stack([_mix(_weights(*p), values) for p in parts], dim=-1))
    return _pad(levels, x, spec), _pad(jacobians, x, spec, 3)


def _active(table: Tensor, spec: HashGridSpec, active_levels: int) -> list[tuple[int, Tensor]]:
    """(level, its entries [size, F]) for each active level."""
    # split, not slices: its backward is one concatenation instead of a padded copy a level
    entries = table.view(-1, spec.n_features).split(list(spec.level_sizes))
    return list(enumerate(entries))[: max(active_levels, 0)]


def _pad(levels: list[Tensor], x: Tensor, spec: HashGridSpec, *trailing: int) -> Tensor:
    """Levels [N, F, *trailing] joined on dim 1, zeros for the masked ones."""
    missing = (spec.n_levels - len(levels)) * spec.n_features
    zeros = x.new_zeros((x.shape[0], missing, *trailing))
    return torch.cat([*levels, zeros], dim=1)


def _corners(x: Tensor, spec: HashGridSpec, level: int) -> tuple[Tensor, Tensor]:
    """Entries [8, N] of the eight corners, and the position [N, 3] inside the cell.

    Corner k is +1 along x, y, z where bits 0, 1, 2 of k are set. Corners come first so that the
    innermost dimension is long.
    """
    position = x * spec.scales[level] + 0.5
    floor = position.detach().floor()
    low = floor.long().T[:, None, :]  # [3, 1, N]
    both = torch.cat([low, low + 1], dim=1)  # [3, 2, N]
    if spec.level_is_dense[level]:
        resolution = spec.resolutions[level]
        strides = (1, resolution, resolution * resolution)
    else:
        strides = HASH_PRIMES
    cx, cy, cz = (c * s for c, s in zip(both, strides, strict=True))
    cx, cy, cz = cx[None, None, :], cy[None, :, None], cz[:, None, None]
    if spec.level_is_dense[level]:
        index = cx + cy + cz
    else:  # the size is a power of two: its remainder in 64 bits is the one in 32 bits
        index = cx ^ cy ^ cz
    return (index % spec.level_sizes[level]).flatten(0, 2), position - floor


def _axis_weights(offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - o, o) along each axis, [2, N] each, at offset [N, 3] in [0, 1)."""
    x, y, z = torch.stack([1.0 - offset.T, offset.T], dim=1)  # [3, 2, N]
    return x, y, z


def _weights(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Products [8, N] of the axes' weights [2, N], in the corners' order."""
    return (z[:, None, None] * y[None, :, None] * x[None, None, :]).flatten(0, 2)


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """Sum over the corners: [8, N], [8, N, F] -> [N, F]."""
    return (weights[..., None] * values).sum(dim=0)
