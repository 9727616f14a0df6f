"""Denoisers that can be written down, for tests of what is built around the UNet.

Each knows alpha-bar by itself, so that a wrong level in the code under test shows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from sdi_fast.diffusion.prompt import Condition
from sdi_fast.diffusion.schedule import DDIMSchedule

TOKENS, WIDTH = 3, 2


def sd_schedule(prediction_type: str = "epsilon") -> DDIMSchedule:
    """Stable Diffusion 2.1-base's, its a(t) computed by hand from methods.md A."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return DDIMSchedule(torch.cumprod(1.0 - betas, dim=0), prediction_type=prediction_type)


class FunctionDenoiser:
    """eps(x, a, c) with a [M, 1, 1, 1] and the condition's number c [M, 1, 1, 1]; records calls.

    A "v_prediction" schedule gets the v that stands for that eps.
    """

    def __init__(
        self, schedule: DDIMSchedule, eps: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        self.schedule = schedule
        self.eps = eps
        self.calls: list[tuple[Tensor, Tensor]] = []  # x, t

    def predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.calls.append((x.clone(), t.clone()))
        a = self.schedule.alphas_cumprod[t.clamp(min=0)].to(x.dtype).view(-1, 1, 1, 1)
        eps = self.eps(x, a, context[:, 0, 0].to(x.dtype).view(-1, 1, 1, 1))
        if self.schedule.prediction_type == "v_prediction":
            return (eps - (1 - a).sqrt() * x) / a.sqrt()
        return eps


def model_of(
    eps: Callable[[Tensor, Tensor, Tensor], Tensor], prediction_type: str = "epsilon"
) -> SimpleNamespace:
    schedule = sd_schedule(prediction_type)
    return SimpleNamespace(schedule=schedule, denoiser=FunctionDenoiser(schedule, eps))


def gaussian_eps(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """The exact noise prediction where data are N(c, 0.3^2) in every number."""
    variance = a * 0.3**2 + 1 - a
    return (1 - a).sqrt() * (x - a.sqrt() * c) / variance


def wavy_eps(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """Nonlinear and different for each condition, bounded."""
    return torch.tanh(x * (1 + 0.3 * c)) * 0.6 + 0.2 * torch.sin(3 * x.roll(1, -1) + c) - 0.1 * a


def condition_numbers(
    numbers: list[list[float]],  # [K][B]
    neg_weights: list[list[float]] | None = None,  # [B][2]
) -> Condition:
    """A condition whose every embedding holds one number."""
    values = torch.tensor(numbers, dtype=torch.float64)
    weights = None if neg_weights is None else torch.tensor(neg_weights, dtype=torch.float64)
    return Condition(values[:, :, None, None].expand(-1, -1, TOKENS, WIDTH), weights)
