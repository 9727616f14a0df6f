"""The convexity loss on a normal map (methods.md D, Losses; G6).

Kernels: csrc/cpu/convexity.cpp, csrc/cuda/convexity.cu, sdi_fast/kernels/convexity.py (Triton).
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
    opacity: Tensor | None = None,  # [B, H, W, 1]
    c2w: Tensor | None = None,  # [B, 3, 4], columns right, up, -look, position
    *,
    backend: str = "auto",
) -> Tensor:
    """Scalar: minus the mean third component of cross products of neighbours on an 8 x 8 map.

    Without `opacity` and `c2w` the normals are taken as they stand (the official code: world frame,
    encoded as opacity * (n + 1) / 2). With both, encoded normals are decoded to opacity * n and
    turned to axes fixed to the camera first, of which the loss sees 256 pixels. The Triton kernel
    has only the first way. Gradients: normals, opacity.

    Raises:
        SDIFastError: for tensors that do not fit each other, or for one of the two without the
            other.
    """
    check_tensor("normals", normals, (None, None, None, 3))
    if normals.numel() == 0:
        raise SDIFastError(f"normals: expected at least one pixel, got {list(normals.shape)}")
    if (opacity is None) != (c2w is None):
        raise SDIFastError("opacity, c2w: expected both or neither, got one")
    if opacity is not None:
        check_tensor("opacity", opacity, (*normals.shape[:3], 1), like=normals)
        check_tensor("c2w", c2w, (normals.shape[0], 3, 4), like=normals)
    native = ("cpu", "cuda", "triton") if opacity is None else ("cpu", "cuda")
    chosen = resolve_backend("convexity_loss", normals, backend, native)
    if chosen == "reference":
        return convexity_loss_reference(normals, opacity, c2w)
    if chosen == "triton":
        return _triton_forward(normals)
    return _forward(normals, opacity, None if c2w is None else c2w.detach())


@torch.library.custom_op(
    "sdi_fast::convexity_fwd",
    mutates_args=(),
    schema="(Tensor normals, Tensor? opacity, Tensor? c2w) -> Tensor",
)
def _forward(normals: Tensor, opacity: Tensor | None, c2w: Tensor | None) -> Tensor:
    normals, opacity, c2w = _contiguous(normals, opacity, c2w)
    loss = normals.new_empty(())
    workspace = normals.new_empty(normals.shape[0], dtype=torch.float64)  # untouched on the CPU
    call("convexity_fwd", normals, *normals.shape[:3], normals, opacity, c2w, loss, workspace)
    return loss


@torch.library.custom_op(
    "sdi_fast::convexity_bwd",
    mutates_args=(),
    schema="(Tensor normals, Tensor? opacity, Tensor? c2w, Tensor grad) -> (Tensor, Tensor)",
)
def _backward(
    normals: Tensor, opacity: Tensor | None, c2w: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of normals and of opacity; the second one is empty where there is no opacity."""
    normals, opacity, c2w = _contiguous(normals, opacity, c2w)
    grad_normals = torch.empty_like(normals)
    grad_opacity = normals.new_empty(0) if opacity is None else torch.empty_like(opacity)
    given = (normals, opacity, c2w, grad.contiguous())
    call("convexity_bwd", normals, *normals.shape[:3], *given, grad_normals, grad_opacity)
    return grad_normals, grad_opacity


def _contiguous(
    normals: Tensor, opacity: Tensor | None, c2w: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if opacity is None or c2w is None:
        return normals.contiguous(), None, None
    return normals.contiguous(), opacity.contiguous(), c2w.contiguous()


_TRITON_FORWARD = "(Tensor normals) -> Tensor"
_TRITON_BACKWARD = "(Tensor normals, Tensor grad) -> Tensor"


@torch.library.custom_op("sdi_fast::convexity_triton_fwd", mutates_args=(), schema=_TRITON_FORWARD)
def _triton_forward(normals: Tensor) -> Tensor:
    from ..kernels.convexity import convexity_fwd  # here, since Triton is optional

    return convexity_fwd(normals)


@torch.library.custom_op("sdi_fast::convexity_triton_bwd", mutates_args=(), schema=_TRITON_BACKWARD)
def _triton_backward(normals: Tensor, grad: Tensor) -> Tensor:
    from ..kernels.convexity import convexity_bwd

    return convexity_bwd(normals, grad)


@_forward.register_fake
def _(normals: Tensor, opacity: Tensor | None, c2w: Tensor | None) -> Tensor:
    return normals.new_empty(())


@_backward.register_fake
def _(
    normals: Tensor, opacity: Tensor | None, c2w: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    shape = (0,) if opacity is None else opacity.shape
    return normals.new_empty(normals.shape), normals.new_empty(shape)


@_triton_forward.register_fake
def _(normals: Tensor) -> Tensor:
    return normals.new_empty(())


@_triton_backward.register_fake
def _(normals: Tensor, grad: Tensor) -> Tensor:
    return normals.new_empty(normals.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_normals, grad_opacity = _backward(*ctx.saved_tensors, grad)
    return grad_normals, None if ctx.saved_tensors[1] is None else grad_opacity, None


def _triton_autograd(ctx: Any, grad: Tensor) -> Tensor:
    return _triton_backward(*ctx.saved_tensors, grad)


_forward.register_autograd(_autograd, setup_context=_setup_context)
_triton_forward.register_autograd(_triton_autograd, setup_context=_setup_context)
