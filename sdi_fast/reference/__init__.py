"""Plain-PyTorch twins of the ops, same signatures: what the kernels are judged by."""

from __future__ import annotations

from .adam import adam_step
from .background import background
from .composite import composite
from .convexity import convexity_loss
from .field import density, field
from .hash_encode import hash_encode
from .march import march
from .occupancy import update_occupancy
from .prune import prune
from .ray_losses import ray_losses
from .rays import generate_rays
from .render_views import render_views
from .shade import shade

__all__ = [
    "adam_step",
    "background",
    "composite",
    "convexity_loss",
    "density",
    "field",
    "generate_rays",
    "hash_encode",
    "march",
    "prune",
    "ray_losses",
    "render_views",
    "shade",
    "update_occupancy",
]
