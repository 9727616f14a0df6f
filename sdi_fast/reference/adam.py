"""Adam (methods.md D, Optimiser). Twin of ops/adam.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def adam_step(
    param: Tensor,  # any shape, changed in place
    grad: Tensor,  # like param
    exp_avg: Tensor,  # like param, changed in place
    exp_avg_sq: Tensor,  # like param, changed in place
    step: int | Tensor,  # 1 at the first step; or i64 []
    lr: float | Tensor,  # or f64 []
    betas: tuple[float, float],
    eps: float,
    *,
    shadow: Tensor | None = None,  # f16, shaped like param, changed in place
    skip: Tensor | None = None,  # bool []
) -> None:
    """One bias-corrected step: p -= lr m^ / (sqrt(v^) + eps), as torch.optim.Adam computes it.

    `shadow` becomes the new parameters, rounded. Where `skip` is true nothing is changed.
    """
    if skip is not None and bool(skip):
        return
    steps, rate = int(step), float(lr)
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1.0 - beta2**steps)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-rate / (1.0 - beta1**steps))
    if shadow is not None:
        shadow.copy_(param)
