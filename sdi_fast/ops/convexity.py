"""The convexity loss on a normal map (methods.md D, Losses)."""

from __future__ import annotations

from torch import Tensor

from ..reference.convexity import convexity_loss as convexity_loss_reference
from ..types import SDIFastError
from ._checks import check_tensor
from ._native import resolve_backend


def convexity_loss(
    normals: Tensor,  # [B, H, W, 3] f32 or f64
    *,
    backend: str = "auto",
) -> Tensor:
    """Scalar: minus the mean third component of cross products of neighbours on an 8 x 8 map.

    Gradient: normals.
    """
    check_tensor("normals", normals, (None, None, None, 3))
    if normals.numel() == 0:
        raise SDIFastError(f"normals: expected at least one pixel, got {list(normals.shape)}")
    resolve_backend("convexity_loss", normals, backend, ())
    return convexity_loss_reference(normals)
