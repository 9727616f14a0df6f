"""Adam without weight decay (methods.md D, Optimiser). Kernel: csrc/cpu/adam.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.adam import adam_step as adam_step_reference
from ..types import SDIFastError
from ._checks import check_positive, check_tensor
from ._native import call, resolve_backend


def adam_step(
    param: Tensor,  # any shape, f32 or f64; written in place
    grad: Tensor,  # like param
    exp_avg: Tensor,  # like param; written in place
    exp_avg_sq: Tensor,  # like param; written in place
    step: int,  # 1-based
    lr: float,
    betas: tuple[float, float],
    eps: float,
    *,
    backend: str = "auto",
) -> None:
    """One step of Adam with bias correction, in place."""
    check_tensor("param", param, tuple(param.shape))
    for name, value in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_tensor(name, value, tuple(param.shape), like=param)
    for name, value in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not value.is_contiguous():
            raise SDIFastError(
                f"{name}: expected a contiguous tensor, since it is written in place"
            )
    if not isinstance(step, int) or step < 1:
        raise SDIFastError(f"step: expected an int of at least 1, got {step!r}")
    check_positive("lr", lr, zero_ok=True)
    check_positive("eps", eps, zero_ok=True)
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise SDIFastError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    if resolve_backend("adam_step", param, backend, ("cpu",)) == "reference":
        adam_step_reference(param, grad, exp_avg, exp_avg_sq, step, lr, betas, eps)
        return
    with torch.no_grad():
        numbers = [float(lr), float(betas[0]), float(betas[1]), float(eps)]
        _step(param, grad, exp_avg, exp_avg_sq, step, numbers)


@torch.library.custom_op(
    "sdi_fast::adam_step",
    mutates_args=("param", "exp_avg", "exp_avg_sq"),
    schema="(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, int step, "
    "float[] numbers) -> ()",
)
def _step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    numbers: list[float],  # lr, beta1, beta2, eps
) -> None:
    arrays = (param, grad.contiguous(), exp_avg, exp_avg_sq)
    call("adam_step", param, param.numel(), *arrays, step, *numbers)


@_step.register_fake
def _(*args: object) -> None:
    return None
