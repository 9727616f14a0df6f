"""Shading by one point light a view (methods.md D, Shading).

Kernels: csrc/cpu/shade.cpp, csrc/cuda/shade.cu; the backward recomputes the light. A view index
outside its array is an error on the CPU; on a GPU it gives the sample a light of NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..constants import SHADINGS
from ..reference.shade import shade as shade_reference
from ..types import SDIFastError
from ._checks import check_tensor
from ._native import call, resolve_backend


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
    if resolve_backend("shade", albedo, backend, ("cpu", "cuda")) == "reference":
        return shade_reference(albedo, normal, x_world, light_positions, view_indices, shading)
    if shading == "albedo":
        return albedo  # as the twin
    x_world, light_positions = x_world.detach(), light_positions.detach()
    kind = SHADINGS.index(shading)  # csrc/shade.h Shading
    return _forward(albedo, normal, x_world, light_positions, view_indices, kind)


_INPUTS = "(Tensor albedo, Tensor normal, Tensor x, Tensor lights, Tensor views, {}int shading)"


@torch.library.custom_op(
    "sdi_fast::shade_fwd", mutates_args=(), schema=_INPUTS.format("") + " -> Tensor"
)
def _forward(*args: Any) -> Tensor:
    *tensors, shading = args
    albedo, normal, x, lights, views = (t.contiguous() for t in tensors)
    rgb = torch.empty_like(albedo)
    given = (albedo, normal, x, lights, views)
    sizes = (albedo.shape[0], lights.shape[0])
    call("shade_fwd", albedo, shading, *sizes, *given, rgb, indices="view_indices")
    return rgb


@torch.library.custom_op(
    "sdi_fast::shade_bwd",
    mutates_args=(),
    schema=_INPUTS.format("Tensor grad, ") + " -> (Tensor, Tensor)",
)
def _backward(*args: Any) -> tuple[Tensor, Tensor]:
    """Gradients of albedo and normal."""
    *tensors, shading = args
    albedo, normal, x, lights, views, grad = (t.contiguous() for t in tensors)
    grad_albedo, grad_normal = torch.empty_like(albedo), torch.empty_like(normal)
    given = (albedo, normal, x, lights, views, grad, grad_albedo, grad_normal)
    sizes = (albedo.shape[0], lights.shape[0])
    call("shade_bwd", albedo, shading, *sizes, *given, indices="view_indices")
    return grad_albedo, grad_normal


@_forward.register_fake
def _(*args: Any) -> Tensor:
    return args[0].new_empty(args[0].shape)


@_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return args[0].new_empty(args[0].shape), args[1].new_empty(args[1].shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shading = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, grad, ctx.shading), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
