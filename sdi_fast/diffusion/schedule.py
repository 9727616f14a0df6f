"""Noise levels, time steps and inversion paths (methods.md A, B, C1, C5, G1 to G5).

a(t) is alpha-bar, x_t = sqrt(a) z + sqrt(1 - a) eps, s(t) = sqrt((1 - a) / a). A time step below
zero is the clean end of the schedule: level a(0), or 1 where the config sets alpha to one.
Latents are [B, C, h, w] f32 and time steps [B] i64 unless a comment says otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import GuidanceConfig, Variant
from ..types import SDIFastError

PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing")
PAPER_MAX_TAU_INVERSE = 30  # the paper draws tau from U(0, 1/30) of the schedule (methods.md G2)


def draw_normal(
    shape: tuple[int, ...] | torch.Size,
    generator: torch.Generator,
    like: Tensor,
) -> Tensor:
    """N(0, 1) of `shape`, drawn in f32 on the generator's device, then moved to `like`'s.

    A CPU generator gives the same numbers on every device, and drawing them needs no GPU sync.
    """
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return noise.to(device=like.device, dtype=like.dtype, non_blocking=True)


class DDIMSchedule:
    """The DDIM quantities of a diffusers scheduler config, for per-sample time steps.

    clip_sample and thresholding are ignored: they are meant for pixels, and Stable Diffusion's
    configs turn them off.

    Args:
        alphas_cumprod: [T] f32, falling.
        prediction_type: what the UNet predicts, one of PREDICTION_TYPES.
        alpha_clean: a(t) for t < 0; a(0) where None.
        steps_offset: added to every step of a "leading" grid.
        timestep_spacing: one of TIMESTEP_SPACINGS.

    Raises:
        SDIFastError: for an unknown prediction type or spacing.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        *,
        prediction_type: str = "epsilon",
        alpha_clean: float | None = None,
        steps_offset: int = 1,
        timestep_spacing: str = "leading",
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise SDIFastError(
                f"scheduler: prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, "
                f"got {prediction_type!r}"
            )
        if timestep_spacing not in TIMESTEP_SPACINGS:
            raise SDIFastError(
                f"scheduler: timestep_spacing: expected one of {', '.join(TIMESTEP_SPACINGS)}, "
                f"got {timestep_spacing!r}"
            )
        clean = (
            alphas_cumprod[:1] if alpha_clean is None else alphas_cumprod.new_tensor([alpha_clean])
        )
        self._levels = torch.cat([clean, alphas_cumprod])  # [T + 1]; entry t + 1 is a(t)
        self.prediction_type = prediction_type
        self.steps_offset = steps_offset
        self.timestep_spacing = timestep_spacing

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> DDIMSchedule:
        """The schedule of a scheduler_config.json, whatever scheduler class wrote it.

        Raises:
            SDIFastError: where diffusers' DDIMScheduler cannot be built from it.
        """
        from diffusers import DDIMScheduler

        known = inspect.signature(DDIMScheduler.__init__).parameters
        kwargs = {key: value for key, value in config.items() if key in known}
        prediction_type = kwargs.pop("prediction_type", "epsilon")
        try:
            scheduler: Any = DDIMScheduler(**kwargs)
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            raise SDIFastError(
                f"scheduler: expected a config that DDIM can read, got {str(error).splitlines()[0]}"
            ) from error
        return cls(
            scheduler.alphas_cumprod.to(device=device, dtype=torch.float32),
            prediction_type=prediction_type,
            alpha_clean=float(scheduler.final_alpha_cumprod),
            steps_offset=int(kwargs.get("steps_offset", 0)),
            timestep_spacing=kwargs.get("timestep_spacing", "leading"),
        )

    @property
    def device(self) -> torch.device:
        return self._levels.device

    @property
    def n_train_steps(self) -> int:
        return self._levels.numel() - 1

    @property
    def alphas_cumprod(self) -> Tensor:
        """a(t) of t = 0 .. T - 1, [T] f32."""
        return self._levels[1:]

    @property
    def levels(self) -> Tensor:
        """[T + 1] f32: entry t + 1 is a(t), entry 0 that of the clean end, t < 0."""
        return self._levels

    # ---- levels and predictions -------------------------------------------------------------

    def alpha(
        self,
        t: Tensor,  # any shape, i64, < T; negative: the clean end
    ) -> Tensor:
        """a(t), in t's shape, f32; no host sync."""
        return self._levels[t.to(self.device, non_blocking=True).clamp(min=-1) + 1]

    def sigma(self, t: Tensor) -> Tensor:
        """s(t) = sqrt((1 - a) / a), in t's shape, f32."""
        a = self.alpha(t)
        return ((1.0 - a) / a).sqrt()

    def roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a(t)) and sqrt(1 - a(t)), each [B, 1, 1, 1] in `like`'s dtype."""
        a = self.alpha(t).to(like.dtype).view(-1, 1, 1, 1)
        return a.sqrt(), (1.0 - a).sqrt()

    def add_noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a) z + sqrt(1 - a) eps."""
        signal, noise = self.roots(t, z)
        return signal * z + noise * eps

    def x0_from_eps(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(x - sqrt(1 - a) eps) / sqrt(a)."""
        signal, noise = self.roots(t, x)
        return (x - noise * eps) / signal

    def eps_from_x0(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """(x - sqrt(a) x0) / sqrt(1 - a)."""
        signal, noise = self.roots(t, x)
        return (x - signal * x0) / noise

    def split(
        self,
        x: Tensor,
        output: Tensor,  # [B, C, h, w], what the UNet predicted at (x, t)
        t: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The UNet's output as (x0, eps) (methods.md A)."""
        if self.prediction_type == "epsilon":
            return self.x0_from_eps(x, output, t), output
        signal, noise = self.roots(t, x)
        return signal * x - noise * output, signal * output + noise * x

    def output_from_eps(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a UNet of this prediction type gives where it sees the noise eps in x."""
        if self.prediction_type == "epsilon":
            return eps
        signal, noise = self.roots(t, x)
        return (eps - noise * x) / signal

    def ddim_step(self, x: Tensor, output: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The deterministic DDIM step from level t to level t_next, up or down (B2)."""
        x0, eps = self.split(x, output, t)
        return self.add_noise(x0, eps, t_next)

    def step_variance(self, t: Tensor, t_next: Tensor) -> Tensor:
        """V of methods.md C6 for a step from the cleaner t up to t_next, in t's shape, f32.

        1 - a_next / a is taken as (a - a_next) / a, whose difference is exact for near levels.
        """
        a, a_next = self.alpha(t), self.alpha(t_next)
        return (1.0 - a) * (a - a_next) / ((1.0 - a_next) * a)

    # ---- grids and paths (plain integers, nothing touches the device) -----------------------

    def grid(self, n_steps: int) -> list[int]:
        """The schedule's time steps when it is cut into n_steps, ascending."""
        total = self.n_train_steps
        if not 1 <= n_steps <= total:
            raise SDIFastError(f"inversion_n_steps: expected 1 to {total}, got {n_steps}")
        if self.timestep_spacing == "leading":
            return [k * (total // n_steps) + self.steps_offset for k in range(n_steps)]
        return [round((k + 1) * total / n_steps) - 1 for k in range(n_steps)]

    def inversion_path(
        self, t: int, delta: int, n_steps: int, variant: Variant = "threestudio"
    ) -> tuple[int, ...]:
        """Time steps of an inversion to level min(t + delta, T - 1), the clean end first.

        "threestudio" (methods.md C5): the grid's steps below t, with one step of its stride
        before the first (-99 for SD with ten steps). "paper" (G2, G5): int(n_steps t / T) equal
        steps, at least one, from step 0.

        Raises:
            SDIFastError: for t at or below 1, where the grid is empty (G9), or beyond T - 1.
        """
        total = self.n_train_steps
        grid = self.grid(n_steps)
        end = self._end(t, delta)
        if variant == "paper":
            count = max(n_steps * t // total, 1)
            return tuple(round(k * end / count) for k in range(count + 1))
        below = [node for node in grid if node < t]
        if not below:
            raise SDIFastError(
                f"t: expected more than {grid[0]}, the first step of a grid of "
                f"inversion_n_steps={n_steps}, got {t}"
            )
        return (below[0] - total // n_steps, *below, end)

    def even_path(self, t: int, delta: int, n_steps: int) -> tuple[int, ...]:
        """Equal steps from a "leading" grid's first to level min(t + delta, T - 1).

        1 + ceil((n_steps - 1) t / T) of them, n_steps at most and mostly two at least. z stands for
        x at the first: the grid's path begins before it and asks the UNet twice at the clean end.

        Raises:
            SDIFastError: for t at or below 1, as inversion_path does, or beyond T - 1.
        """
        first, end = self.steps_offset, self._end(t, delta)
        count = min(1 + -(-(n_steps - 1) * t // self.n_train_steps), max(t - first, 1))
        return tuple(first + round(k * (end - first) / count) for k in range(count + 1))

    def _end(self, t: int, delta: int) -> int:
        """The level at which an inversion ends; checks both."""
        total = self.n_train_steps
        if not 1 < t < total:
            raise SDIFastError(
                f"t: expected a time step from 2 to {total - 1} for an inversion, got {t}; "
                "raise the lower end of guidance.t_range"
            )
        if delta < 0:
            raise SDIFastError(f"delta: expected at least 0, got {delta}")
        return min(t + delta, total - 1)


def delta_from_uniform(
    uniform: Tensor,  # any shape, f64 in [0, 1)
    n_steps: int,
    n_train_steps: int = 1000,
    variant: Variant = "threestudio",
) -> Tensor:
    """How far beyond t an inversion runs, in time steps: floor(T U / n), or floor(T U / 30)."""
    parts = PAPER_MAX_TAU_INVERSE if variant == "paper" else n_steps
    return (uniform.double() * n_train_steps).div(parts, rounding_mode="floor").long()


def draw_delta(
    batch_size: int,
    generator: torch.Generator,
    config: GuidanceConfig,
    n_train_steps: int = 1000,
) -> Tensor:
    """One delta a sample, [B] i64 on the generator's device (methods.md C5, G2)."""
    uniform = torch.rand(
        batch_size, generator=generator, device=generator.device, dtype=torch.float64
    )
    return delta_from_uniform(uniform, config.inversion_n_steps, n_train_steps, config.variant)


def annealed_timestep(
    step: int,
    max_steps: int,
    config: GuidanceConfig,
    *,
    batch_size: int = 1,
    generator: torch.Generator | None = None,
    n_train_steps: int = 1000,
) -> Tensor:
    """The time step of each sample at an optimisation step, [B] i64 on the CPU (methods.md C1).

    With t_anneal all samples share one t, falling linearly over the run from the upper to the
    lower end of t_range and staying there; without, each is a uniform integer of that range,
    both ends included. An upper end of 1 means the last time step.

    Raises:
        SDIFastError: for a t_range outside 0 <= low <= high <= 1, or a missing generator.
    """
    low, high = config.t_range
    if not 0.0 <= low <= high <= 1.0:
        raise SDIFastError(f"t_range: expected 0 <= low <= high <= 1, got ({low}, {high})")
    if max_steps < 1:
        raise SDIFastError(f"max_steps: expected at least 1, got {max_steps}")
    last = n_train_steps - 1
    if config.t_anneal:
        progress = min(step / max_steps, 1.0)
        fraction = (high - low) * (1.0 - progress) + low
        return torch.full((batch_size,), min(int(n_train_steps * fraction), last))
    if generator is None:
        raise SDIFastError("generator: expected a torch.Generator when t_anneal is off, got None")
    first, final = (min(int(n_train_steps * end), last) for end in (low, high))
    drawn = torch.randint(
        first, final + 1, (batch_size,), generator=generator, device=generator.device
    )
    return drawn.cpu()
