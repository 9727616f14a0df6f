"""The losses on single rays (methods.md D, Losses; G10). Twin of ops/ray_losses.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import OPACITY_CLAMP, SPARSITY_EPS, Z_VARIANCE_MIN_OPACITY


def ray_losses(
    opacity: Tensor,  # [R], in [0, 1]
    orient: Tensor,  # [R], per-ray orientation penalty
    z_variance: Tensor,  # [R], scene units^2
) -> Tensor:  # [4]
    """The unweighted losses orient, sparsity, opaque and z_variance.

    Where the official code averages over no pixels (0 / 0), orient and z_variance are 0.
    Differentiable in all three.
    """
    clamped = opacity.clamp(OPACITY_CLAMP, 1.0 - OPACITY_CLAMP)
    entropy = -(clamped * clamped.log() + (1.0 - clamped) * (1.0 - clamped).log())
    return torch.stack(
        [
            _mean_where(orient, opacity > 0.0),
            (opacity.square() + SPARSITY_EPS).sqrt().mean(),
            entropy.mean(),
            _mean_where(z_variance, opacity > Z_VARIANCE_MIN_OPACITY),
        ]
    )


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over all of `values` / number of True in `mask`; 0 where there is none.

    `values` are zero outside the mask: rays without opacity have no samples, and z_variance is
    masked where it is made.
    """
    return values.sum() / mask.sum().clamp_min(1)
