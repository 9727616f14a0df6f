"""SDI's convexity loss (methods.md D, Losses; G6). Twin of ops/convexity.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..constants import CONVEXITY_GRID


def convexity_loss(
    normals: Tensor,  # [B, H, W, 3], rows downwards
    opacity: Tensor | None = None,  # [B, H, W, 1]
    c2w: Tensor | None = None,  # [B, 3, 4]
) -> Tensor:  # scalar
    """-(mean [M(r, c) x M(r, c+1)]_3 + mean [M(r+1, c) x M(r, c)]_3), M the 8 x 8 bilinear map.

    The third component is along whichever axis the normals have third: world z for encoded world
    normals (the official code). With `opacity` and `c2w` the encoded normals are first decoded and
    turned to `camera_frame_normals`. Differentiable in normals and opacity.
    """
    if opacity is not None and c2w is not None:
        normals = camera_frame_normals(normals, opacity, c2w.detach())
    m = F.interpolate(
        normals.permute(0, 3, 1, 2),
        size=(CONVEXITY_GRID, CONVEXITY_GRID),
        mode="bilinear",
        align_corners=False,
    )  # [B, 3, 8, 8]
    rightwards = _cross_third(m[..., :, :-1], m[..., :, 1:])
    upwards = _cross_third(m[..., 1:, :], m[..., :-1, :])
    return -(rightwards.mean() + upwards.mean())


def camera_frame_normals(
    comp_normal: Tensor,  # [B, H, W, 3], opacity * (n + 1) / 2, world frame
    opacity: Tensor,  # [B, H, W, 1]
    c2w: Tensor,  # [B, 3, 4]
) -> Tensor:  # [B, H, W, 3], opacity * n
    """Decoded normals in a frame fixed to the camera, made for the convexity loss.

    The loss takes the third component of n x n' for pixel pairs that go right and up. Along a
    convex surface n turns about +up as the pixel goes right and about -right as it goes up, so the
    third axis is (up - right) / sqrt 2: both pairs then count, with the same sign, from every
    viewpoint (methods.md G6). Along the viewing axis both would vanish. The first axis points to
    the viewer and the second, (right + up) / sqrt 2, completes a right-handed frame.
    """
    right, up, toward_viewer = c2w[:, :, 0], c2w[:, :, 1], c2w[:, :, 2]
    half = math.sqrt(0.5)
    axes = torch.stack([toward_viewer, half * (right + up), half * (up - right)], dim=1)  # [B,3,3]
    return torch.einsum("bij,bhwj->bhwi", axes, 2.0 * comp_normal - opacity)


def _cross_third(a: Tensor, b: Tensor) -> Tensor:
    """Third component of a x b over dim 1."""
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
