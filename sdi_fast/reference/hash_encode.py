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

_UINT32 = 0xFFFFFFFF


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
        levels.append((_weights(offset)[..., None] * entries[index]).sum(dim=1))
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
        values = entries[index]  # [N, 8, F]
        levels.append((_weights(offset)[..., None] * values).sum(dim=1))
        slopes = _weight_slopes(offset) * spec.scales[level]  # [N, 8, 3]
        jacobians.append(torch.einsum("nkf,nkd->nfd", values, slopes))
    return _pad(levels, x, spec), _pad(jacobians, x, spec)


def _active(table: Tensor, spec: HashGridSpec, active_levels: int) -> list[tuple[int, Tensor]]:
    """(level, its entries [size, F]) for each active level."""
    # split, not slices: its backward is one concatenation instead of a padded copy a level
    entries = table.view(-1, spec.n_features).split(list(spec.level_sizes))
    return list(enumerate(entries))[: max(active_levels, 0)]


def _pad(levels: list[Tensor], x: Tensor, spec: HashGridSpec) -> Tensor:
    """Levels [N, F, ...] joined on dim 1, zeros for the masked ones."""
    missing = (spec.n_levels - len(levels)) * spec.n_features
    trailing = levels[0].shape[2:] if levels else ()
    zeros = x.new_zeros((x.shape[0], missing, *trailing))
    return torch.cat([*levels, zeros], dim=1)


def _corners(x: Tensor, spec: HashGridSpec, level: int) -> tuple[Tensor, Tensor]:
    """Entries [N, 8] of the eight corners, and the position [N, 3] inside the cell.

    Corner k is +1 along x, y, z where bits 0, 1, 2 of k are set.
    """
    position = x * spec.scales[level] + 0.5
    floor = position.detach().floor()
    bits = (torch.arange(8, device=x.device)[:, None] >> torch.arange(3, device=x.device)) & 1
    cx, cy, cz = (floor.long()[:, None, :] + bits).unbind(-1)  # [N, 8] each
    size = spec.level_sizes[level]
    if spec.level_is_dense[level]:
        resolution = spec.resolutions[level]
        index = (cx + resolution * (cy + resolution * cz)) % size
    else:  # the low 32 bits of XORs and products do not depend on the higher ones
        px, py, pz = HASH_PRIMES
        index = (((cx * px) ^ (cy * py) ^ (cz * pz)) & _UINT32) % size
    return index, position - floor


def _weights(offset: Tensor) -> Tensor:
    """Trilinear weights [N, 8] at offset [N, 3] in [0, 1)."""
    x, y, z = _axis_weights(offset)
    return (z[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]).flatten(1)


def _weight_slopes(offset: Tensor) -> Tensor:
    """Derivatives [N, 8, 3] of the trilinear weights by the offset."""
    x, y, z = _axis_weights(offset)
    slope = torch.tensor([-1.0, 1.0], dtype=offset.dtype, device=offset.device).expand_as(x)
    parts = [(slope, y, z), (x, slope, z), (x, y, slope)]
    return torch.stack(
        [
            (c[:, :, None, None] * b[:, None, :, None] * a[:, None, None, :]).flatten(1)
            for a, b, c in parts
        ],
        dim=-1,
    )


def _axis_weights(offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - o, o) along each axis, [N, 2] each."""
    both = torch.stack([1.0 - offset, offset], dim=-1)  # [N, 3, 2]
    return both[:, 0], both[:, 1], both[:, 2]
