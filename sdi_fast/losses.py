"""Losses on the rendered images, besides the guidance (methods.md D, Losses; G6 and G10)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import LossConfig, schedule_value
from .constants import OPACITY_CLAMP, SPARSITY_EPS, Z_VARIANCE_MIN_OPACITY
from .ops.convexity import convexity_loss
from .types import Camera, RenderOutput, SDIFastError

WEIGHT_NAMES = ("guidance", "orient", "sparsity", "opaque", "z_variance", "convex")


def render_losses(
    output: RenderOutput, camera: Camera, config: LossConfig, step: int
) -> dict[str, Tensor]:
    """Unweighted scalars "orient", "sparsity", "opaque", "z_variance" and "convex".

    On an empty volume the official means over no pixels are 0/0; here they are 0, so that values
    and gradients stay finite. A loss whose weight is 0 at `step` is still reported.
    """
    opacity = output.opacity
    clamped = opacity.clamp(OPACITY_CLAMP, 1.0 - OPACITY_CLAMP)
    entropy = -(clamped * clamped.log() + (1.0 - clamped) * (1.0 - clamped).log())
    return {
        "orient": _mean_where(output.orient, opacity > 0.0),
        "sparsity": (opacity.square() + SPARSITY_EPS).sqrt().mean(),
        "opaque": entropy.mean(),
        "z_variance": _mean_where(output.z_variance, opacity > Z_VARIANCE_MIN_OPACITY),
        "convex": convexity_loss(_convexity_normals(output, camera, config)),
    }


def loss_weights(config: LossConfig, step: int) -> dict[str, float]:
    """The weight of each loss at `step`, "guidance" included."""
    return {name: schedule_value(getattr(config, name), step) for name in WEIGHT_NAMES}


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


def _convexity_normals(output: RenderOutput, camera: Camera, config: LossConfig) -> Tensor:
    if config.convex_frame == "world":
        return output.comp_normal
    if config.convex_frame == "camera":
        return camera_frame_normals(output.comp_normal, output.opacity, camera.c2w)
    raise SDIFastError(
        f'loss.convex_frame: expected "world" or "camera", got {config.convex_frame!r}'
    )


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over all of `values` / number of True in `mask`; 0 where there is none.

    `values` are zero outside the mask: rays without opacity have no samples, and z_variance is
    masked where it is made.
    """
    return values.sum() / mask.sum().clamp_min(1)
