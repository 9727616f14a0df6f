"""The environment map: spherical harmonics of degree 3 and an MLP (methods.md D, Background)."""

from __future__ import annotations

from torch import Tensor

from ..reference.background import background as background_reference
from ._checks import check_tensor
from ._native import resolve_backend


def background(
    directions: Tensor,  # [R, 3] f32 or f64, unit length, world frame
    w1: Tensor,  # [16, 9]
    w2: Tensor,  # [16, 16]
    w3: Tensor,  # [3, 16]
    *,
    backend: str = "auto",
) -> Tensor:
    """Colour [R, 3] in (0, 1). Gradients: w1, w2, w3."""
    check_tensor("directions", directions, (None, 3))
    check_tensor("w1", w1, (16, 9), like=directions)
    check_tensor("w2", w2, (16, 16), like=directions)
    check_tensor("w3", w3, (3, 16), like=directions)
    resolve_backend("background", directions, backend, ())
    return background_reference(directions, w1, w2, w3)
