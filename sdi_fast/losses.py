"""Losses on the rendered images, besides the guidance (methods.md D, Losses; G6 and G10)."""

from __future__ import annotations

from torch import Tensor

from .config import LossConfig, schedule_value
from .ops.convexity import convexity_loss
from .ops.ray_losses import ray_losses
from .types import Camera, RenderOutput, SDIFastError

WEIGHT_NAMES = ("guidance", "orient", "sparsity", "opaque", "z_variance", "convex")
RAY_LOSS_NAMES = ("orient", "sparsity", "opaque", "z_variance")  # as the op gives them


def render_losses(
    output: RenderOutput, camera: Camera, config: LossConfig, *, backend: str = "auto"
) -> dict[str, Tensor]:
    """Unweighted scalars "orient", "sparsity", "opaque", "z_variance" and "convex".

    On an empty volume the official means over no pixels are 0/0; here they are 0, so that values
    and gradients stay finite. A loss whose weight is 0 is still reported.

    Args:
        backend: of the ops, see `sdi_fast.ops`.
    """
    images = (output.opacity, output.orient, output.z_variance)
    by_ray = ray_losses(*(image.reshape(-1) for image in images), backend=backend).unbind()
    losses = dict(zip(RAY_LOSS_NAMES, by_ray, strict=True))
    losses["convex"] = _convexity(output, camera, config, backend)
    return losses


def loss_weights(config: LossConfig, step: int) -> dict[str, float]:
    """The weight of each loss at `step`, "guidance" included."""
    return {name: schedule_value(getattr(config, name), step) for name in WEIGHT_NAMES}


def _convexity(
    output: RenderOutput, camera: Camera, config: LossConfig, backend: str
) -> Tensor:  # scalar
    if config.convex_frame == "world":
        return convexity_loss(output.comp_normal, backend=backend)
    if config.convex_frame == "camera":
        return convexity_loss(output.comp_normal, output.opacity, camera.c2w, backend=backend)
    raise SDIFastError(
        f'loss.convex_frame: expected "world" or "camera", got {config.convex_frame!r}'
    )
