"""Marching through the occupancy grid (methods.md D, Marching)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.march import march as march_reference
from ..types import Samples, SDIFastError
from ._checks import check_positive, check_tensor
from ._native import resolve_backend


def march(
    origins: Tensor,  # [R, 3] f32 or f64, scene units
    directions: Tensor,  # [R, 3], unit length
    occupancy: Tensor,  # [G, G, G] bool, index (x, y, z)
    radius: float,  # scene units
    step_size: float,  # scene units
    near: float,  # scene units
    jitter: Tensor | None = None,  # [R], scene units, in [0, step_size)
    *,
    backend: str = "auto",
) -> Samples:
    """The intervals of length step_size whose midpoint lies in an occupied cell of the box.

    No gradient.
    """
    check_tensor("origins", origins, (None, 3))
    check_tensor("directions", directions, (origins.shape[0], 3), like=origins)
    check_tensor("occupancy", occupancy, (None, None, None), dtype=torch.bool, like=origins)
    if occupancy.numel() == 0 or len(set(occupancy.shape)) != 1:
        raise SDIFastError(
            f"occupancy: expected a cube [G, G, G] with G >= 1, got {list(occupancy.shape)}"
        )
    check_positive("radius", radius)
    check_positive("step_size", step_size)
    check_positive("near", near, zero_ok=True)
    if jitter is not None:
        check_tensor("jitter", jitter, (origins.shape[0],), like=origins)
    resolve_backend("march", origins, backend, ())
    return march_reference(origins, directions, occupancy, radius, step_size, near, jitter)
