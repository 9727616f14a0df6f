"""The environment map: spherical harmonics and an MLP (methods.md D, Background).

Kernels: csrc/cpu/background.cpp, csrc/cuda/background.cu; the backward recomputes the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.background import background as background_reference
from ._checks import check_tensor
from ._native import call, extension, resolve_backend


def background(
    directions: Tensor,  # [R, 3] f32 or f64, unit length, world frame
    w1: Tensor,  # [16, 9]
    w2: Tensor,  # [16, 16]
    w3: Tensor,  # [3, 16]
    *,
    backend: str = "auto",
) -> Tensor:
    """Colour [R, 3] in (0, 1). Gradients: w1, w2, w3."""
    check_tensor("directions", directions, (None, 3))
    check_tensor("w1", w1, (16, 9), like=directions)
    check_tensor("w2", w2, (16, 16), like=directions)
    check_tensor("w3", w3, (3, 16), like=directions)
    if resolve_backend("background", directions, backend, ("cpu", "cuda")) == "reference":
        return background_reference(directions, w1, w2, w3)
    return _forward(directions.detach(), w1, w2, w3)


@torch.library.custom_op(
    "sdi_fast::background_fwd",
    mutates_args=(),
    schema="(Tensor directions, Tensor w1, Tensor w2, Tensor w3) -> Tensor",
)
def _forward(*args: Tensor) -> Tensor:
    directions, w1, w2, w3 = (t.contiguous() for t in args)
    rgb = torch.empty_like(directions)
    call("background_fwd", directions, directions.shape[0], directions, w1, w2, w3, rgb)
    return rgb


@torch.library.custom_op(
    "sdi_fast::background_bwd",
    mutates_args=(),
    schema="(Tensor directions, Tensor w1, Tensor w2, Tensor w3, Tensor grad)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three weights."""
    directions, w1, w2, w3, grad = (t.contiguous() for t in args)
    n_weights, n_rows = extension().BACKGROUND_WEIGHTS, extension().BACKGROUND_MAX_BLOCKS
    flat = directions.new_empty(n_weights)
    workspace = directions.new_empty(n_rows, n_weights)  # untouched by the CPU's kernel
    given = (directions.shape[0], directions, w1, w2, w3, grad)
    call("background_bwd", directions, *given, flat, workspace)
    grads = flat.split([w1.numel(), w2.numel(), w3.numel()])
    return grads[0].view_as(w1).clone(), grads[1].view_as(w2).clone(), grads[2].view_as(w3).clone()


@_forward.register_fake
def _(*args: Tensor) -> Tensor:
    return args[0].new_empty(args[0].shape)


@_backward.register_fake
def _(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w1, w2, w3 = (w.new_empty(w.shape) for w in args[1:4])
    return w1, w2, w3


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return None, *_backward(*ctx.saved_tensors, grad)


_forward.register_autograd(_autograd, setup_context=_setup_context)
