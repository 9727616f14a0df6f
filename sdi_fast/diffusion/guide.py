"""Classifier-free guidance and Perp-Neg (methods.md B3, C3, G7)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..config import GuidanceConfig
from ..constants import PERP_EPS
from ..types import SDIFastError
from .denoiser import DenoiserLike
from .prompt import Condition

Convention = Literal["threestudio", "paper"]


def cfg_convention(config: GuidanceConfig) -> Convention:
    """The convention that `config` asks for; by default that of its variant."""
    return config.variant if config.cfg_convention == "variant" else config.cfg_convention


def perpendicular(
    x: Tensor,  # [B, C, h, w]
    y: Tensor,  # [B, C, h, w]
) -> Tensor:
    """The part of x perpendicular to y, each sample on its own: x - y <x, y> / <y, y>."""
    dims = tuple(range(1, x.ndim))
    along = (x * y).sum(dims, keepdim=True)
    length = (y * y).sum(dims, keepdim=True).clamp(min=PERP_EPS)
    return x - y * (along / length)


def combine(
    outputs: Tensor,  # [K, B, C, h, w]: positive, unconditional(, negative 1, negative 2)
    neg_weights: Tensor | None,  # [B, 2] where K = 4
    scale: float,
    convention: Convention,
) -> Tensor:
    """The guided prediction, [B, C, h, w].

    With Perp-Neg (K = 4) both conventions read u + scale (d + sum w_i perp(n_i - u, d)); without
    it, "paper" is u + scale (p - u) and "threestudio" p + scale (p - u), one more of (p - u).
    It may be used on v as on eps: the two differ by a factor of the differences and by x.
    """
    positive, uncond = outputs[0], outputs[1]
    direction = positive - uncond
    if neg_weights is None:
        start = uncond if convention == "paper" else positive
        return start + scale * direction
    weights = neg_weights.to(outputs.dtype)
    total = direction
    for i in range(weights.shape[1]):
        away = perpendicular(outputs[2 + i] - uncond, direction)
        total = total + weights[:, i].view(-1, 1, 1, 1) * away
    return uncond + scale * total


def guided_output(
    denoiser: DenoiserLike,
    x: Tensor,  # [B, C, h, w] f32
    t: Tensor,  # [B] i64
    condition: Condition,
    scale: float,
    convention: Convention,
) -> Tensor:
    """The guided UNet output (eps or v) for B samples from one forward of K B, [B, C, h, w]."""
    k, b = condition.n_conditions, condition.batch_size
    if x.shape[0] != b or t.shape != (b,):
        raise SDIFastError(
            f"x, t: expected {b} samples as in the condition, got shapes {tuple(x.shape)} and "
            f"{tuple(t.shape)}"
        )
    # Condition-major on both sides, so that row k * B + b is condition k of sample b (G8).
    if not getattr(denoiser, "shares_latents", False):
        rows, steps = x.repeat(k, 1, 1, 1), t.repeat(k)
    else:  # what does not see the text is then computed once for all conditions
        rows, steps = x, t
    outputs = denoiser.predict(rows, steps, condition.embeddings.flatten(0, 1))
    return combine(outputs.view(k, b, *x.shape[1:]), condition.neg_weights, scale, convention)
