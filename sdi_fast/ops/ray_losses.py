"""The losses on single rays: orient, sparsity, opaque, z_variance (methods.md D, Losses; G10).

Kernels: csrc/cpu/ray_losses.cpp, csrc/cuda/ray_losses.cu; one pass forward, one backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.ray_losses import ray_losses as ray_losses_reference
from ._checks import check_tensor
from ._native import call, extension, resolve_backend


def ray_losses(
    opacity: Tensor,  # [R] f32 or f64, in [0, 1]
    orient: Tensor,  # [R], per-ray orientation penalty, not normalised
    z_variance: Tensor,  # [R], scene units^2
    *,
    backend: str = "auto",
) -> Tensor:
    """The four unweighted losses [4]: orient, sparsity, opaque, z_variance.

    orient = sum / max(#{O > 0}, 1); sparsity = mean sqrt(O^2 + .01); opaque = mean binary entropy
    of O clamped to [.001, .999]; z_variance = sum / max(#{O > .5}, 1). Of no rays at all, sparsity
    and opaque are NaN. Gradients: opacity, orient, z_variance.

    Raises:
        SDIFastError: for tensors that do not fit each other.
    """
    check_tensor("opacity", opacity, (None,))
    check_tensor("orient", orient, tuple(opacity.shape), like=opacity)
    check_tensor("z_variance", z_variance, tuple(opacity.shape), like=opacity)
    if resolve_backend("ray_losses", opacity, backend, ("cpu", "cuda")) == "reference":
        return ray_losses_reference(opacity, orient, z_variance)
    return _forward(opacity, orient, z_variance)[0]


@torch.library.custom_op(
    "sdi_fast::ray_losses_fwd",
    mutates_args=(),
    schema="(Tensor opacity, Tensor orient, Tensor z_variance) -> (Tensor, Tensor)",
)
def _forward(*args: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [4], and the numbers of rays [2] f64 that the backward divides by."""
    opacity, orient, z_variance = (t.contiguous() for t in args)
    losses = opacity.new_empty(4)
    counts = opacity.new_empty(2, dtype=torch.float64)
    rows, columns = extension().RAY_LOSSES_MAX_BLOCKS, extension().RAY_SUMS
    workspace = counts.new_empty(rows, columns)  # untouched by the CPU's kernel
    arrays = (opacity, orient, z_variance, losses, counts, workspace)
    call("ray_losses_fwd", opacity, opacity.numel(), *arrays)
    return losses, counts


@torch.library.custom_op(
    "sdi_fast::ray_losses_bwd",
    mutates_args=(),
    schema="(Tensor opacity, Tensor counts, Tensor grad) -> (Tensor, Tensor, Tensor)",
)
def _backward(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of opacity, orient and z_variance."""
    opacity, counts, grad = (t.contiguous() for t in args)
    grads = tuple(torch.empty_like(opacity) for _ in range(3))
    call("ray_losses_bwd", opacity, opacity.numel(), opacity, counts, grad, *grads)
    return grads  # type: ignore[return-value]


@_forward.register_fake
def _(*args: Tensor) -> tuple[Tensor, Tensor]:
    return args[0].new_empty(4), args[0].new_empty(2, dtype=torch.float64)


@_backward.register_fake
def _(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (args[0].new_empty(args[0].shape) for _ in range(3))
    return a, b, c


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(*ctx.saved_tensors, grad)


_forward.register_autograd(_autograd, setup_context=_setup_context)
