"""The convexity loss on a normal map (methods.md D, Losses).

Kernels: csrc/cpu/convexity.cpp, sdi_fast/kernels/convexity.py (Triton).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.convexity import convexity_loss as convexity_loss_reference
from ..types import SDIFastError
from ._checks import check_tensor
from ._native import call, resolve_backend


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
    chosen = resolve_backend("convexity_loss", normals, backend, ("cpu", "triton"))
    if chosen == "reference":
        return convexity_loss_reference(normals)
    return (_triton_forward if chosen == "triton" else _forward)(normals)


_FORWARD = "(Tensor normals) -> Tensor"
_BACKWARD = "(Tensor normals, Tensor grad) -> Tensor"


@torch.library.custom_op("sdi_fast::convexity_fwd", mutates_args=(), schema=_FORWARD)
def _forward(normals: Tensor) -> Tensor:
    normals = normals.contiguous()
    loss = normals.new_empty(())
    call("convexity_fwd", normals, *normals.shape[:3], normals, loss)
    return loss


@torch.library.custom_op("sdi_fast::convexity_bwd", mutates_args=(), schema=_BACKWARD)
def _backward(normals: Tensor, grad: Tensor) -> Tensor:
    normals, grad = normals.contiguous(), grad.contiguous()
    grad_normals = torch.zeros_like(normals)
    call("convexity_bwd", normals, *normals.shape[:3], normals, grad, grad_normals)
    return grad_normals


@torch.library.custom_op("sdi_fast::convexity_triton_fwd", mutates_args=(), schema=_FORWARD)
def _triton_forward(normals: Tensor) -> Tensor:
    from ..kernels.convexity import convexity_fwd  # here, since Triton is optional

    return convexity_fwd(normals)


@torch.library.custom_op("sdi_fast::convexity_triton_bwd", mutates_args=(), schema=_BACKWARD)
def _triton_backward(normals: Tensor, grad: Tensor) -> Tensor:
    from ..kernels.convexity import convexity_bwd

    return convexity_bwd(normals, grad)


@_forward.register_fake
@_triton_forward.register_fake
def _(normals: Tensor) -> Tensor:
    return normals.new_empty(())


@_backward.register_fake
@_triton_backward.register_fake
def _(normals: Tensor, grad: Tensor) -> Tensor:
    return normals.new_empty(normals.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _register_autograd(forward: Any, backward: Any) -> None:
    def autograd(ctx: Any, grad: Tensor) -> Tensor:
        return backward(*ctx.saved_tensors, grad)

    forward.register_autograd(autograd, setup_context=_setup_context)


_register_autograd(_forward, _backward)
_register_autograd(_triton_forward, _triton_backward)
