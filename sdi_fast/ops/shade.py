"""Shading by one point light a view (methods.md D, Shading)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import SHADINGS
from ..reference.shade import shade as shade_reference
from ..types import SDIFastError
from ._checks import check_tensor
from ._native import resolve_backend


def shade(
    albedo: Tensor,  # [N, 3] f32 or f64, in [0, 1]
    normal: Tensor,  # [N, 3], unit length, world frame
    x_world: Tensor,  # [N, 3], scene units
    light_positions: Tensor,  # [B, 3], scene units
    view_indices: Tensor,  # [N] i64, in [0, B)
    shading: str,  # "albedo", "textureless" or "diffuse"
    *,
    backend: str = "auto",
) -> Tensor:
    """Colour [N, 3]. Gradients: albedo, normal."""
    check_tensor("albedo", albedo, (None, 3))
    n = albedo.shape[0]
    check_tensor("normal", normal, (n, 3), like=albedo)
    check_tensor("x_world", x_world, (n, 3), like=albedo)
    check_tensor("light_positions", light_positions, (None, 3), like=albedo)
    check_tensor("view_indices", view_indices, (n,), dtype=torch.int64, like=albedo)
    if shading not in SHADINGS:
        raise SDIFastError(f"shading: expected one of {', '.join(SHADINGS)}, got {shading!r}")
    resolve_backend("shade", albedo, backend, ())
    return shade_reference(albedo, normal, x_world, light_positions, view_indices, shading)
