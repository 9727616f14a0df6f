"""SDI's convexity loss (methods.md D, Losses; G6). Twin of ops/convexity.py."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..constants import CONVEXITY_GRID


def convexity_loss(
    normals: Tensor,  # [B, H, W, 3], rows downwards
) -> Tensor:  # scalar
    """-(mean [M(r, c) x M(r, c+1)]_3 + mean [M(r+1, c) x M(r, c)]_3), M the 8 x 8 bilinear map.

    The third component is along whichever axis the normals have third: world z for encoded world
    normals (the official code), the viewing axis for camera-frame ones.
    """
    m = F.interpolate(
        normals.permute(0, 3, 1, 2),
        size=(CONVEXITY_GRID, CONVEXITY_GRID),
        mode="bilinear",
        align_corners=False,
    )  # [B, 3, 8, 8]
    rightwards = _cross_third(m[..., :, :-1], m[..., :, 1:])
    upwards = _cross_third(m[..., 1:, :], m[..., :-1, :])
    return -(rightwards.mean() + upwards.mean())


def _cross_third(a: Tensor, b: Tensor) -> Tensor:
    """Third component of a x b over dim 1."""
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
