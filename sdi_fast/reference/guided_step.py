"""Guidance and one DDIM step, or the prediction of z (methods.md A, B3, C3, C6, C7).

Twin of ops/guided_step.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import PERP_EPS
from ..types import StepSpec
from .philox import philox_normal


def guided_step(
    outputs: Tensor,  # [K, B, C, h, w], as the UNet left them: positive, unconditional(, negatives)
    x: Tensor,  # [B, C, h, w] f32 or f64
    levels: Tensor,  # [T + 1] f32: entry t + 1 is a(t), entry 0 stands for every t < 0
    t: Tensor,  # [B] i64: the level of x
    t_next: Tensor | None,  # [B] i64: where to; None predicts z instead
    neg_weights: Tensor | None,  # [B, 2] f32 where K = 4, else None
    spec: StepSpec,
    *,
    lengths: Tensor | None = None,  # [B] i64: samples with lengths <= step keep x
    step: int = 0,
    noise: Tensor | None = None,  # [B, C, h, w]: standard normal
    rng: Tensor | None = None,  # [2] i64, seed and offset: draws the noise where none is given
    draw: int = 0,  # which draw after the offset
) -> tuple[Tensor, Tensor]:
    """x at t_next (or z), and the guided eps, both [B, C, h, w] like x."""
    output = _combine(outputs.to(x.dtype), neg_weights, spec)
    a = _level(levels, t, x)
    if spec.v_prediction:
        x0 = a.sqrt() * x - (1.0 - a).sqrt() * output
        eps = a.sqrt() * output + (1.0 - a).sqrt() * x
    else:
        x0, eps = (x - (1.0 - a).sqrt() * output) / a.sqrt(), output
    if t_next is None:
        return x0, eps
    b = _level(levels, t_next, x)
    moved = b.sqrt() * x0 + (1.0 - b).sqrt() * eps
    if noise is None and rng is not None and spec.eta != 0.0:
        noise = philox_normal(rng, draw, x.shape[0], x[0].numel()).view(x.shape)
    if noise is not None:
        # V of C6, with 1 - b / a as (a - b) / a, whose difference is exact for near levels
        variance = ((1.0 - a) * (a - b) / ((1.0 - b) * a)).clamp(min=0.0)
        moved = moved + spec.eta * variance.sqrt() * noise.to(x.dtype)
    if lengths is not None:
        moved = torch.where((lengths > step).view(-1, 1, 1, 1), moved, x)
    return moved, eps


def _level(levels: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """a(t), [B, 1, 1, 1] in `like`'s dtype."""
    index = t.clamp(min=-1, max=levels.numel() - 2) + 1
    return levels[index].to(like.dtype).view(-1, 1, 1, 1)


def _combine(
    outputs: Tensor,  # [K, B, C, h, w]
    neg_weights: Tensor | None,  # [B, 2]
    spec: StepSpec,
) -> Tensor:
    uncond = outputs[1]
    direction = outputs[0] - uncond
    if neg_weights is None:
        start = uncond if spec.paper_convention else outputs[0]
        return start + spec.scale * direction
    length = direction.square().sum((1, 2, 3), keepdim=True).clamp(min=PERP_EPS)
    total = direction
    for away, weight in zip(outputs[2:] - uncond, neg_weights.to(outputs.dtype).T, strict=True):
        along = (away * direction).sum((1, 2, 3), keepdim=True) / length
        total = total + weight.view(-1, 1, 1, 1) * (away - along * direction)
    return uncond + spec.scale * total
