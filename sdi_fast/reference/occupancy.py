"""Occupancy grid update (methods.md D, Marching). Twin of ops/occupancy.py."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_occupancy(
    occs: Tensor,  # [G^3] f32, x slowest, density * dt; changed in place
    cells: Tensor,  # [M] i64 in [0, G^3), repeats allowed
    values: Tensor,  # [M] density * dt at a point of each cell, >= 0
    decay: float,
    threshold: float,
) -> Tensor:  # [G, G, G] bool
    """occs = max(decay occs, value) in the given cells; occupied = occs > min(mean, threshold).

    A cell given more than once decays once and takes its largest value, so that the result does
    not depend on the order of `cells`. The mean is over all cells.
    """
    largest = torch.zeros_like(occs).scatter_reduce_(0, cells, values.to(occs.dtype), "amax")
    touched = torch.zeros_like(occs, dtype=torch.bool)
    touched[cells] = True
    occs.copy_(torch.where(touched, torch.maximum(decay * occs, largest), occs))
    resolution = round(occs.numel() ** (1.0 / 3.0))
    return (occs > occs.mean().clamp_max(threshold)).view(resolution, resolution, resolution)
