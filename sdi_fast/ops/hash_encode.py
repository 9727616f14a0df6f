"""Multiresolution hash encoding (methods.md D, Geometry)."""

from __future__ import annotations

from torch import Tensor

from ..reference.hash_encode import hash_encode as hash_encode_reference
from ..types import HashGridSpec
from ._checks import check_grid, check_tensor
from ._native import resolve_backend


def hash_encode(
    x: Tensor,  # [N, 3] f32 or f64, in [0, 1]
    table: Tensor,  # [P], tiny-cuda-nn's layout
    spec: HashGridSpec,
    active_levels: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Features [N, L * F], zero from level `active_levels` on. Gradients: table, x."""
    check_tensor("x", x, (None, 3))
    check_grid(table, spec, active_levels, x)
    resolve_backend("hash_encode", x, backend, ())
    return hash_encode_reference(x, table, spec, active_levels)
