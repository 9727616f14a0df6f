"""The convexity loss on a normal map (methods.md D, Losses). Kernel: csrc/cpu/convexity.cpp."""

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
    if resolve_backend("convexity_loss", normals, backend, ("cpu",)) == "reference":
        return convexity_loss_reference(normals)
    return _forward(normals)


@torch.library.custom_op(
    "sdi_fast::convexity_fwd", mutates_args=(), schema="(Tensor normals) -> Tensor"
)
def _forward(normals: Tensor) -> Tensor:
    normals = normals.contiguous()
    loss = normals.new_empty(())
    call("convexity_fwd", normals, *normals.shape[:3], normals, loss)
    return loss


@torch.library.custom_op(
    "sdi_fast::convexity_bwd", mutates_args=(), schema="(Tensor normals, Tensor grad) -> Tensor"
)
def _backward(normals: Tensor, grad: Tensor) -> Tensor:
    normals, grad = normals.contiguous(), grad.contiguous()
    grad_normals = torch.zeros_like(normals)
    call("convexity_bwd", normals, *normals.shape[:3], normals, grad, grad_normals)
    return grad_normals


@_forward.register_fake
def _(normals: Tensor) -> Tensor:
    return normals.new_empty(())


@_backward.register_fake
def _(normals: Tensor, grad: Tensor) -> Tensor:
    return normals.new_empty(normals.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> Tensor:
    return _backward(*ctx.saved_tensors, grad)


_forward.register_autograd(_autograd, setup_context=_setup_context)
