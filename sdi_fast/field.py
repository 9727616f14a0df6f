"""What is optimised: the radiance field and the background (methods.md D)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import FieldConfig
from .constants import HASH_INIT_BOUND
from .ops.background import background as background_op
from .ops.field import density as density_op
from .ops.field import field as field_op
from .types import FieldParams, FieldSpec, SDIFastError


class NeRFField(nn.Module):
    """Hash grid and two MLPs; the parameters are named as in FieldParams.

    Args:
        generator: for the initial values, on the CPU; torch's default one where None.
        backend: of the ops, see `sdi_fast.ops`.
    """

    def __init__(
        self,
        config: FieldConfig,
        *,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.spec: FieldSpec = config.spec()
        self.backend = backend
        grid, hidden = self.spec.grid, self.spec.hidden
        self.table = _uniform((grid.n_params,), HASH_INIT_BOUND, generator)
        self.density_w1 = _linear(hidden, grid.n_output_dims, generator)
        self.density_w2 = _linear(1, hidden, generator)
        self.color_w1 = _linear(hidden, grid.n_output_dims, generator)
        self.color_w2 = _linear(3, hidden, generator)

    def params(self) -> FieldParams:
        """The parameters as the ops take them."""
        return FieldParams(
            self.table, self.density_w1, self.density_w2, self.color_w1, self.color_w2
        )

    def active_levels(self, step: int) -> int:
        """Levels of the hash grid that are not masked at `step`."""
        return self.config.active_levels(step)

    def density(self, x: Tensor, step: int) -> Tensor:
        """Density [N], in 1/scene unit, at world points x [N, 3]. No gradient."""
        with torch.no_grad():
            return density_op(
                x, self.params(), self.spec, self.active_levels(step), backend=self.backend
            )

    def forward(self, x: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Density [N], albedo [N, 3] and unit normal [N, 3] at world points x [N, 3]."""
        return field_op(x, self.params(), self.spec, self.active_levels(step), backend=self.backend)


class EnvironmentBackground(nn.Module):
    """Colour by direction: spherical harmonics into a 9-16-16-3 MLP."""

    def __init__(self, *, generator: torch.Generator | None = None, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.w1 = _linear(16, 9, generator)
        self.w2 = _linear(16, 16, generator)
        self.w3 = _linear(3, 16, generator)

    def forward(self, directions: Tensor) -> Tensor:
        """Colour [R, 3] in [0, 1] along unit directions [R, 3]."""
        return background_op(directions, self.w1, self.w2, self.w3, backend=self.backend)


def _uniform(
    shape: tuple[int, ...], bound: float, generator: torch.Generator | None
) -> nn.Parameter:
    return nn.Parameter((torch.rand(shape, generator=generator) * 2.0 - 1.0) * bound)


def _linear(n_out: int, n_in: int, generator: torch.Generator | None) -> nn.Parameter:
    """torch.nn.Linear's default: uniform within 1 / sqrt(n_in)."""
    return _uniform((n_out, n_in), 1.0 / math.sqrt(n_in), generator)


def _check(config: FieldConfig) -> None:
    for name in ("n_levels", "n_features", "log2_hashmap_size", "base_resolution", "hidden"):
        value = getattr(config, name)
        if value < 1:
            raise SDIFastError(f"field.{name}: expected at least 1, got {value}")
    for name in ("radius", "blob_std", "per_level_scale"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise SDIFastError(f"field.{name}: expected a number above 0, got {value}")
    if config.start_level < 0:
        raise SDIFastError(f"field.start_level: expected at least 0, got {config.start_level}")
