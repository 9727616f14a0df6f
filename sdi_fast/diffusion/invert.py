"""DDIM inversion with entropy noise, per-sample levels (methods.md C5 to C7, G1 to G5).

Samples of one batch may have different t and delta. Those with shorter paths leave the batch
early: each result is what the sample would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import GuidanceConfig
from ..types import SDIFastError
from .denoiser import DenoiserLike
from .guide import Convention, cfg_convention, guided_output
from .prompt import Condition
from .schedule import DDIMSchedule, draw_normal


class DiffusionModel(Protocol):
    """What guidance needs of a pipeline."""

    @property
    def schedule(self) -> DDIMSchedule: ...

    @property
    def denoiser(self) -> DenoiserLike: ...


@dataclass(frozen=True)
class InversionPlan:
    """Which time steps each sample visits; made on the host, so that no step waits for one."""

    nodes: Tensor  # [S + 1, B] i64, on the model's device; a finished sample repeats its level
    lengths: tuple[int, ...]  # steps of each of the B samples

    @property
    def n_steps(self) -> int:
        return max(self.lengths)

    @property
    def level(self) -> Tensor:
        """[B] i64, the level at which each inversion ends."""
        return self.nodes[-1]


@dataclass(frozen=True)
class Inversion:
    """Where an inversion ended."""

    latents_inverted: Tensor  # [B, C, h, w] f32, x at `level`
    kappa: Tensor  # [B, C, h, w] f32, the noise that takes z to it (paper: with H(t) added)
    level: Tensor  # [B] i64
    n_unet_calls: int
    trajectory: tuple[Tensor, ...]  # x after every step where asked for, else empty


def plan_inversion(
    schedule: DDIMSchedule,
    t: Sequence[int],
    delta: Sequence[int],
    config: GuidanceConfig,
) -> InversionPlan:
    """The plan of B inversions to t + delta.

    Raises:
        SDIFastError: for a t that cannot be inverted to (methods.md G9).
    """
    padded, lengths = inversion_paths(schedule, t, delta, config)
    nodes = torch.tensor(padded).T.contiguous().to(schedule.device, non_blocking=True)
    return InversionPlan(nodes, lengths)


def inversion_path(
    schedule: DDIMSchedule, t: int, delta: int, config: GuidanceConfig
) -> tuple[int, ...]:
    """The time steps that `config` asks for: of its grid, or even ones (config.Shortcuts)."""
    n_steps, even = config.inversion_n_steps, config.shortcuts.even_steps
    if even:
        return schedule.even_path(t, delta, min(even, n_steps))
    return schedule.inversion_path(t, delta, n_steps, config.variant)


def n_unet_calls(schedule: DDIMSchedule, t: int, config: GuidanceConfig) -> int:
    """UNet forwards of one target at t: the inversion's and the prediction's."""
    return len(inversion_path(schedule, t, 0, config))


def inversion_paths(
    schedule: DDIMSchedule,
    t: Sequence[int],
    delta: Sequence[int],
    config: GuidanceConfig,
) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The time steps of each of B inversions, repeating the last to equal lengths; their steps."""
    if not t or len(t) != len(delta):
        raise SDIFastError(f"t, delta: expected one of each a sample, got {len(t)}, {len(delta)}")
    paths = [
        inversion_path(schedule, t_i, delta_i, config)
        for t_i, delta_i in zip(t, delta, strict=True)
    ]
    longest = max(len(path) for path in paths)
    padded = [path + path[-1:] * (longest - len(path)) for path in paths]
    return padded, tuple(len(path) - 1 for path in paths)


@torch.no_grad()
def ddim_invert(
    model: DiffusionModel,
    latents: Tensor,  # [B, C, h, w] f32, z
    condition: Condition,
    plan: InversionPlan,
    config: GuidanceConfig,
    *,
    eta_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    with_trajectory: bool = False,
) -> Inversion:
    """Runs z up the DDIM trajectory to each sample's level.

    Args:
        eta_noise: standard normal noise, [S, B, C, h, w] in the threestudio variant (row s is
            used in step s), [1, B, C, h, w] in the paper's; drawn from `generator` where None.
        with_trajectory: keep x after every step.
    """
    eta = config.inversion_eta
    n_noise = 1 if config.variant == "paper" else plan.n_steps
    noise = _entropy_noise((n_noise, *latents.shape), latents, eta, eta_noise, generator)
    x = z = latents.detach()
    trajectory = []
    for step in range(plan.n_steps):
        rows = [b for b, length in enumerate(plan.lengths) if step < length]
        extra = noise[step] if noise is not None and config.variant == "threestudio" else None
        if len(rows) == len(plan.lengths):
            x = _step(model, x, condition, plan.nodes[step : step + 2], config, extra)
        else:
            pick = torch.tensor(rows).to(x.device, non_blocking=True)
            moved = _step(
                model,
                x[pick],
                condition.select(pick),
                plan.nodes[step : step + 2, pick],
                config,
                None if extra is None else extra[pick],
            )
            x = x.index_copy(0, pick, moved)
        if with_trajectory:
            trajectory.append(x)
    kappa = model.schedule.eps_from_x0(x, z, plan.level)
    if noise is not None and config.variant == "paper":
        # H of B11, once and on kappa (G3), at the level that kappa belongs to
        _, spread = model.schedule.roots(plan.level, x)
        kappa = kappa + eta * spread * noise[0]
    return Inversion(x, kappa, plan.level, plan.n_steps, tuple(trajectory))


def _step(
    model: DiffusionModel,
    x: Tensor,  # [M, C, h, w]
    condition: Condition,
    nodes: Tensor,  # [2, M] i64: from, to
    config: GuidanceConfig,
    noise: Tensor | None,  # [M, C, h, w]
) -> Tensor:
    """One step of C6; the UNet is told the cleaner level, from which the step starts."""
    t, t_next = nodes[0], nodes[1]
    output = guided_output(
        model.denoiser,
        x,
        t,
        condition,
        config.inversion_guidance_scale,
        cfg_convention(config),
    )
    moved = model.schedule.ddim_step(x, output, t, t_next)
    if noise is None:
        return moved
    spread = model.schedule.step_variance(t, t_next).sqrt().to(x.dtype).view(-1, 1, 1, 1)
    return moved + config.inversion_eta * spread * noise


def _entropy_noise(
    shape: tuple[int, ...],
    like: Tensor,
    eta: float,
    given: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    """The given noise, checked, or fresh noise of `shape`; None where eta is zero."""
    if eta == 0.0:
        return None
    if given is not None:
        if tuple(given.shape) != shape:
            raise SDIFastError(f"eta_noise: expected shape {shape}, got {tuple(given.shape)}")
        return given.to(like)
    if generator is None:
        raise SDIFastError(
            f"generator: expected a torch.Generator for inversion_eta={eta}, got None"
        )
    return draw_normal(shape, generator, like)


@torch.no_grad()
def ddim_walk(
    model: DiffusionModel,
    x: Tensor,  # [B, C, h, w] f32, at level path[0]
    condition: Condition,
    path: Sequence[int],  # time steps, falling to sample, rising to invert
    scale: float,
    convention: Convention = "paper",
) -> Tensor:
    """Plain deterministic DDIM along `path`, [B, C, h, w]; a last step below 0 is clean."""
    for t, t_next in zip(path[:-1], path[1:], strict=True):
        now, then = (torch.full((x.shape[0],), level, device=x.device) for level in (t, t_next))
        output = guided_output(model.denoiser, x, now, condition, scale, convention)
        x = model.schedule.ddim_step(x, output, now, then)
    return x
