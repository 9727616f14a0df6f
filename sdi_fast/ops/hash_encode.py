"""Multiresolution hash encoding (methods.md D, Geometry).

Kernels: csrc/cpu/hash_encode.cpp, csrc/cuda/hash_encode.cu. On a GPU the table's gradient is summed
with atomics, in any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.hash_encode import hash_encode as hash_encode_reference
from ..types import HashGridSpec
from ._checks import check_grid, check_tensor
from ._native import call, grid_numbers, native_grid, resolve_backend


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
    if resolve_backend("hash_encode", x, backend, ("cpu", "cuda")) == "reference":
        return hash_encode_reference(x, table, spec, active_levels)
    return _forward(x, table, list(grid_numbers(spec)), active_levels)


@torch.library.custom_op(
    "sdi_fast::hash_encode_fwd",
    mutates_args=(),
    schema="(Tensor x, Tensor table, float[] grid, int active_levels) -> Tensor",
)
def _forward(x: Tensor, table: Tensor, grid: list[float], active_levels: int) -> Tensor:
    x, table = x.contiguous(), table.contiguous()
    features = x.new_empty(x.shape[0], int(grid[0] * grid[1]))
    spec = native_grid(tuple(grid))
    call("hash_encode_fwd", x, spec, active_levels, x.shape[0], x, table, features)
    return features


@torch.library.custom_op(
    "sdi_fast::hash_encode_bwd",
    mutates_args=(),
    schema="(Tensor x, Tensor table, Tensor grad, float[] grid, int active_levels, bool needs_x)"
    " -> (Tensor, Tensor)",
)
def _backward(
    x: Tensor,
    table: Tensor,
    grad: Tensor,  # [N, L * F]
    grid: list[float],
    active_levels: int,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the table and of x (zeros unless it is needed)."""
    x, table, grad = x.contiguous(), table.contiguous(), grad.contiguous()
    grad_table, grad_x = torch.zeros_like(table), torch.zeros_like(x)
    spec, wanted_x = native_grid(tuple(grid)), grad_x if needs_x else 0
    call(
        "hash_encode_bwd",
        x,
        spec,
        active_levels,
        x.shape[0],
        x,
        table,
        grad,
        grad_table,
        wanted_x,
    )
    return grad_table, grad_x


@_forward.register_fake
def _(x: Tensor, table: Tensor, grid: list[float], active_levels: int) -> Tensor:
    return x.new_empty(x.shape[0], int(grid[0] * grid[1]))


@_backward.register_fake
def _(
    x: Tensor, table: Tensor, grad: Tensor, grid: list[float], active_levels: int, needs_x: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, table, ctx.grid, ctx.active_levels = inputs
    ctx.save_for_backward(x, table)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, table = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    grad_table, grad_x = _backward(x, table, grad, ctx.grid, ctx.active_levels, needs_x)
    return grad_x if needs_x else None, grad_table, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
