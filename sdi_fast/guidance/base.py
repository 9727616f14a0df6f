"""What every guidance method takes and gives.

A method maps latents to a target without gradient; its loss pulls the latents towards it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import GuidanceConfig
from ..diffusion.prompt import Condition
from ..types import SDIFastError


@dataclass(frozen=True)
class GuidanceOutput:
    """One target and how it came about; no gradients."""

    target: Tensor  # [B, C, h, w] f32
    kappa: Tensor  # [B, C, h, w] f32, the noise: inverted (SDI) or drawn (SDS)
    latents_inverted: Tensor  # [B, C, h, w] f32, x at t + delta (SDI) or at t (SDS)
    noise_pred: Tensor  # [B, C, h, w] f32, the guided eps
    t: Tensor  # [B] i64
    delta: Tensor  # [B] i64, 0 for SDS
    n_unet_calls: int  # forwards, each of B times the number of conditions

    def is_finite(self) -> Tensor:
        """Whether every entry of the target is finite: a bool scalar on its device, no sync."""
        return torch.isfinite(self.target).all()


class Guidance(Protocol):
    """A score distillation method."""

    def target(
        self,
        latents: Tensor,  # [B, C, h, w] f32
        condition: Condition,
        t: Tensor,  # [B] i64, best on the CPU: reading it from a GPU waits for that
        generator: torch.Generator | None,
    ) -> GuidanceOutput: ...

    def loss(
        self,
        latents: Tensor,  # [B, C, h, w] f32, with a gradient
        output: GuidanceOutput,
    ) -> Tensor:
        """Scalar; its gradient goes to the latents only."""
        ...


def x0_loss(
    latents: Tensor,  # [B, C, h, w] f32
    target: Tensor,  # [B, C, h, w] f32
) -> Tensor:
    """0.5 mean((z - sg[target])^2) / B, scalar (methods.md C8)."""
    return 0.5 * (latents - target.detach()).square().mean() / latents.shape[0]


def check_inputs(
    latents: Tensor,  # [B, C, h, w]
    condition: Condition,
    t: Tensor,  # [B]
) -> None:
    """Raises SDIFastError where the three do not speak of the same B samples."""
    if latents.ndim != 4:
        raise SDIFastError(f"latents: expected [B, C, h, w], got {tuple(latents.shape)}")
    b = latents.shape[0]
    if t.shape != (b,) or t.dtype.is_floating_point:
        raise SDIFastError(f"t: expected [{b}] integers, got {t.dtype} of {tuple(t.shape)}")
    if condition.batch_size != b:
        raise SDIFastError(f"condition: expected {b} samples, got {condition.batch_size}")


def check_config(config: GuidanceConfig) -> None:
    """Raises SDIFastError for a setting of no known name or out of range."""
    names = {
        "variant": ("threestudio", "paper"),
        "cfg_convention": ("variant", "threestudio", "paper"),
    }
    for name, known in names.items():
        if getattr(config, name) not in known:
            raise SDIFastError(
                f"{name}: expected one of {', '.join(known)}, got {getattr(config, name)!r}"
            )
    if config.inversion_eta < 0:
        raise SDIFastError(f"inversion_eta: expected at least 0, got {config.inversion_eta}")
    if config.inversion_n_steps < 1:
        raise SDIFastError(
            f"inversion_n_steps: expected at least 1, got {config.inversion_n_steps}"
        )
