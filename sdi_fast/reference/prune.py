"""Dropping samples that cannot be seen (methods.md D, Marching). Twin of ops/prune.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Samples
from .composite import alpha_and_transmittance
from .march import pack


@torch.no_grad()
def prune(
    samples: Samples,
    density: Tensor,  # [N] 1/scene unit, >= 0
    early_stop_eps: float,  # transmittance
    alpha_threshold: float,  # alpha; the caller passes min(threshold, mean of the occupancy)
) -> Samples:
    """The samples with T >= early_stop_eps and alpha >= alpha_threshold. No gradient.

    T counts every sample given, those that this call drops included, as nerfacc does.
    """
    alpha, transmittance = alpha_and_transmittance(density, samples)
    keep = (transmittance >= early_stop_eps) & (alpha >= alpha_threshold)
    ray_indices = samples.ray_indices[keep]
    return Samples(
        ray_indices,
        samples.t_starts[keep],
        samples.t_ends[keep],
        pack(ray_indices, samples.packed_info.shape[0]),
    )
