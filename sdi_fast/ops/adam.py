"""Adam without weight decay (methods.md D, Optimiser).

Kernels: csrc/cpu/adam.cpp, csrc/cuda/adam.cu.
"""

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
    step: int | Tensor,  # 1-based; or i64 [] on param's device
    lr: float | Tensor,  # or f64 [] on param's device
    betas: tuple[float, float],
    eps: float,
    *,
    shadow: Tensor | None = None,  # f16, shaped like param; written in place
    skip: Tensor | None = None,  # bool [] on param's device
    backend: str = "auto",
) -> None:
    """One step of Adam with bias correction, in place.

    For CUDA graphs, `step` and `lr` may be tensors, whose values the kernel reads when it runs;
    they are not checked then, and a step below 1 gives infinities.

    Args:
        shadow: a half-precision copy of `param`, kept up to date in the same pass. It has to equal
            `param`, rounded, beforehand: entries that the step cannot move (zero gradient and
            moments) are not written.
        skip: where true, nothing is changed. Unlike an `if`, it needs no synchronisation.

    Raises:
        SDIFastError: for tensors that do not fit each other, or numbers out of range.
    """
    _check_arrays(param, grad, exp_avg, exp_avg_sq, shadow)
    _check_numbers(param, step, lr, betas, eps)
    if skip is not None:
        check_tensor("skip", skip, (), dtype=torch.bool, like=param)
    if resolve_backend("adam_step", param, backend, ("cpu", "cuda")) == "reference":
        adam_step_reference(
            param, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, shadow=shadow, skip=skip
        )
        return
    step_at, step = (step, 0) if isinstance(step, Tensor) else (None, step)
    lr_at, lr = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    numbers = [float(lr), float(betas[0]), float(betas[1]), float(eps)]
    with torch.no_grad():
        _step(param, grad, exp_avg, exp_avg_sq, shadow, step_at, lr_at, skip, step, numbers)


def _check_arrays(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, shadow: Tensor | None
) -> None:
    shape = tuple(param.shape)
    check_tensor("param", param, shape)
    for name, value in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_tensor(name, value, shape, like=param)
    written = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if shadow is not None:
        check_tensor("shadow", shadow, shape, dtype=torch.float16, like=param)
        written["shadow"] = shadow
    for name, value in written.items():
        if not value.is_contiguous():
            raise SDIFastError(
                f"{name}: expected a contiguous tensor, since it is written in place"
            )


def _check_numbers(
    param: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    if isinstance(step, Tensor):
        check_tensor("step", step, (), dtype=torch.int64, like=param)
    elif not isinstance(step, int) or step < 1:
        raise SDIFastError(f"step: expected an int of at least 1, got {step!r}")
    if isinstance(lr, Tensor):
        check_tensor("lr", lr, (), dtype=torch.float64, like=param)
    else:
        check_positive("lr", lr, zero_ok=True)
    check_positive("eps", eps, zero_ok=True)
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise SDIFastError(f"betas: expected two numbers in [0, 1), got {betas!r}")


@torch.library.custom_op(
    "sdi_fast::adam_step",
    mutates_args=("param", "exp_avg", "exp_avg_sq", "shadow"),
    schema="(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!)? shadow, Tensor? step_at, Tensor? lr_at, Tensor? skip, int step, float[] numbers)"
    " -> ()",
)
def _step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    shadow: Tensor | None,
    step_at: Tensor | None,  # in place of step
    lr_at: Tensor | None,  # in place of numbers[0]
    skip: Tensor | None,
    step: int,
    numbers: list[float],  # lr, beta1, beta2, eps
) -> None:
    arrays = (param, grad.contiguous(), exp_avg, exp_avg_sq, shadow)
    call("adam_step", param, param.numel(), *arrays, step_at, lr_at, skip, step, *numbers)


@_step.register_fake
def _(*args: object) -> None:
    return None
