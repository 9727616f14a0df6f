"""The radiance field: hash grid, two MLPs, density blob, closed-form normal (methods.md D)."""

from __future__ import annotations

from torch import Tensor

from ..reference.field import density as density_reference
from ..reference.field import field as field_reference
from ..types import FieldParams, FieldSpec
from ._checks import check_field
from ._native import resolve_backend


def density(
    x_world: Tensor,  # [N, 3] f32 or f64, scene units
    params: FieldParams,
    spec: FieldSpec,
    active_levels: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Density [N] in 1/scene unit, for pruning and occupancy: no gradient."""
    check_field(x_world, params, spec, active_levels)
    resolve_backend("density", x_world, backend, ())
    return density_reference(x_world, params, spec, active_levels)


def field(
    x_world: Tensor,  # [N, 3] f32 or f64, scene units
    params: FieldParams,
    spec: FieldSpec,
    active_levels: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Density [N] in 1/scene unit, albedo [N, 3] in (0, 1), unit normal [N, 3] (world frame).

    Gradients go to the five parameters, through the normal too; none to x_world.
    """
    check_field(x_world, params, spec, active_levels)
    resolve_backend("field", x_world, backend, ())
    return field_reference(x_world, params, spec, active_levels)
