"""Argument checks shared by the ops: each failure is one line that names the argument."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..types import FieldParams, FieldSpec, HashGridSpec, Samples, SDIFastError

Shape = tuple[int | None, ...]
FLOATS = (torch.float32, torch.float64)
ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)
MAX_LEVELS = 32  # csrc/math/grid.h kMaxLevels
MAX_HIDDEN = 256  # csrc/math/mlp.h kMaxHidden
MAX_FEATURES = 128  # csrc/math/mlp.h kMaxInputs


def _text(shape: Shape) -> str:
    return "[" + ", ".join("*" if n is None else str(n) for n in shape) + "]"


def check_tensor(
    name: str,
    value: Any,
    shape: Shape,  # None: any size
    *,
    dtype: torch.dtype | None = None,  # None: f32 or f64
    like: Tensor | None = None,  # has to have this one's device, and its dtype if dtype is None
) -> None:
    """Raise SDIFastError unless `value` is a tensor of that shape, dtype and device."""
    if not isinstance(value, Tensor):
        raise SDIFastError(f"{name}: expected a tensor {_text(shape)}, got {type(value).__name__}")
    fits = len(shape) == value.dim() and all(
        want is None or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise SDIFastError(f"{name}: expected shape {_text(shape)}, got {list(value.shape)}")
    wanted = (dtype,) if dtype else FLOATS if like is None else (like.dtype,)
    if value.dtype not in wanted:
        names = " or ".join(str(d).removeprefix("torch.") for d in wanted)
        raise SDIFastError(
            f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}"
        )
    if like is not None and value.device != like.device:
        raise SDIFastError(f"{name}: expected device {like.device}, got {value.device}")


def check_activation(
    name: str,
    value: Tensor,
    shape: Shape,  # None: any size
    like: Tensor | None = None,  # has to have this one's device
) -> None:
    """Raise SDIFastError unless `value` is of `shape`, f16, bf16 or f32, and on that device."""
    if value.dtype not in ACTIVATIONS:
        raise SDIFastError(
            f"{name}: expected dtype float16, bfloat16 or float32, got "
            f"{str(value.dtype).removeprefix('torch.')}"
        )
    check_tensor(name, value, shape, dtype=value.dtype, like=like)


def check_normed(
    x: Tensor,  # [M, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    shift: Tensor | None,  # [C]
) -> None:
    """Raise SDIFastError unless these are what a layer norm takes."""
    check_activation("x", x, (None, None))
    for name, value in (("weight", weight), ("bias", bias), ("shift", shift)):
        if value is not None:
            check_activation(name, value, (x.shape[1],), x)


def check_gated(
    x: Tensor,  # [M, 2 F]: values, then gates
    bias: Tensor,  # [2 F]
) -> None:
    """Raise SDIFastError unless these are what GEGLU takes."""
    check_activation("x", x, (None, None))
    if x.shape[1] % 2:
        raise SDIFastError(f"x: expected an even number of columns, got {x.shape[1]}")
    check_activation("bias", bias, (x.shape[1],), x)


def check_positive(name: str, value: float, *, zero_ok: bool = False) -> None:
    """Raise SDIFastError unless `value` is a finite number above zero (or zero, if allowed)."""
    good = isinstance(value, int | float) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero_ok):
        kind = "a finite number >= 0" if zero_ok else "a finite number > 0"
        raise SDIFastError(f"{name}: expected {kind}, got {value!r}")


def check_grid(table: Any, spec: HashGridSpec, active_levels: int, like: Tensor) -> None:
    """Raise SDIFastError unless the table and the number of active levels fit `spec`."""
    if not 1 <= spec.n_levels <= MAX_LEVELS:
        raise SDIFastError(f"spec.n_levels: expected 1 to {MAX_LEVELS}, got {spec.n_levels}")
    if not 1 <= spec.n_output_dims <= MAX_FEATURES:
        raise SDIFastError(
            f"spec: expected at most {MAX_FEATURES} features in all, got {spec.n_output_dims}"
        )
    check_tensor("table", table, (spec.n_params,), like=like)
    if not isinstance(active_levels, int) or not 0 <= active_levels <= spec.n_levels:
        raise SDIFastError(
            f"active_levels: expected an int in 0 to {spec.n_levels}, got {active_levels!r}"
        )


def check_field(x_world: Any, params: FieldParams, spec: FieldSpec, active_levels: int) -> None:
    """Raise SDIFastError unless the field's arguments fit each other."""
    check_tensor("x_world", x_world, (None, 3))
    if not 1 <= spec.hidden <= MAX_HIDDEN:
        raise SDIFastError(f"spec.hidden: expected 1 to {MAX_HIDDEN}, got {spec.hidden}")
    check_positive("spec.radius", spec.radius)
    check_positive("spec.blob_std", spec.blob_std)
    check_grid(params.table, spec.grid, active_levels, x_world)
    n_in, hidden = spec.grid.n_output_dims, spec.hidden
    check_tensor("params.density_w1", params.density_w1, (hidden, n_in), like=x_world)
    check_tensor("params.density_w2", params.density_w2, (1, hidden), like=x_world)
    check_tensor("params.color_w1", params.color_w1, (hidden, n_in), like=x_world)
    check_tensor("params.color_w2", params.color_w2, (3, hidden), like=x_world)


def check_samples(samples: Samples, like: Tensor) -> None:
    """Raise SDIFastError unless the samples' tensors fit each other and `like`'s dtype."""
    n = samples.n_samples
    check_tensor("samples.ray_indices", samples.ray_indices, (None,), dtype=torch.int64, like=like)
    check_tensor("samples.t_starts", samples.t_starts, (n,), like=like)
    check_tensor("samples.t_ends", samples.t_ends, (n,), like=like)
    check_tensor(
        "samples.packed_info", samples.packed_info, (None, 2), dtype=torch.int64, like=like
    )
