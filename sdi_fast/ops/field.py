"""The radiance field: hash grid, two MLPs, density blob, closed-form normal (methods.md D).

Kernels: csrc/cpu/field_fwd.cpp and field_bwd.cpp, csrc/cuda/field_fwd.cu and field_bwd.cu; the
backward recomputes the forward. On a GPU the table's gradient is summed with atomics, in any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.field import density as density_reference
from ..reference.field import field as field_reference
from ..types import FieldParams, FieldSpec
from ._checks import check_field
from ._native import call, extension, field_numbers, native_field, resolve_backend


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
    if resolve_backend("density", x_world, backend, ("cpu", "cuda")) == "reference":
        with torch.no_grad():
            return density_reference(x_world, params, spec, active_levels)
    with torch.no_grad():
        return _density(x_world, *params.tensors(), list(field_numbers(spec)), active_levels)


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
    if resolve_backend("field", x_world, backend, ("cpu", "cuda")) == "reference":
        return field_reference(x_world, params, spec, active_levels)
    x_world = x_world.detach()
    return _forward(x_world, *params.tensors(), list(field_numbers(spec)), active_levels)


# x [N, 3] scene units; the five parameters; a FieldSpec's members (_native.field_numbers)
_INPUTS = (
    "(Tensor x, Tensor table, Tensor density_w1, Tensor density_w2, Tensor color_w1, "
    "Tensor color_w2, {}float[] spec, int active_levels)"
)


@torch.library.custom_op(
    "sdi_fast::density", mutates_args=(), schema=_INPUTS.format("") + " -> Tensor"
)
def _density(*args: Any) -> Tensor:
    *tensors, spec, active_levels = args
    x, *params = (t.contiguous() for t in tensors)
    density = x.new_empty(x.shape[0])
    native = native_field(tuple(spec), active_levels)
    call("density", x, native, x.shape[0], x, *params, density)
    return density


@torch.library.custom_op(
    "sdi_fast::field_fwd",
    mutates_args=(),
    schema=_INPUTS.format("") + " -> (Tensor, Tensor, Tensor)",
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, spec, active_levels = args
    x, *params = (t.contiguous() for t in tensors)
    density, albedo, normal = x.new_empty(x.shape[0]), torch.empty_like(x), torch.empty_like(x)
    native = native_field(tuple(spec), active_levels)
    call("field_fwd", x, native, x.shape[0], x, *params, density, albedo, normal)
    return density, albedo, normal


@torch.library.custom_op(
    "sdi_fast::field_bwd",
    mutates_args=(),
    schema=_INPUTS.format("Tensor grad_density, Tensor grad_albedo, Tensor grad_normal, ")
    + " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of the five parameters."""
    *tensors, spec, active_levels = args
    x, *rest = (t.contiguous() for t in tensors)
    grad_table = torch.zeros_like(rest[0])
    grad_weights = [torch.empty_like(w) for w in rest[1:5]]
    native = native_field(tuple(spec), active_levels)
    hidden, n_in = rest[1].shape
    # the GPU's sums of blocks; untouched by the CPU's kernel
    workspace = x.new_empty(extension().FIELD_MAX_BLOCKS, hidden * (2 * n_in + 3))
    call("field_bwd", x, native, x.shape[0], x, *rest, grad_table, *grad_weights, workspace)
    return (grad_table, *grad_weights)


@_density.register_fake
def _(*args: Any) -> Tensor:
    return args[0].new_empty(args[0].shape[0])


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = args[0]
    return x.new_empty(x.shape[0]), x.new_empty(x.shape), x.new_empty(x.shape)


@_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(p.new_empty(p.shape) for p in args[1:6])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.spec, ctx.active_levels = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    parameters = _backward(*ctx.saved_tensors, *grads, ctx.spec, ctx.active_levels)
    return None, *parameters, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
