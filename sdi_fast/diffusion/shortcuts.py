"""Approximate inversions: which calls of the UNet may be cheaper, and how (config.Shortcuts).

Consecutive steps of one inversion ask the UNet for nearly the same, and so do Perp-Neg's negatives:

- even_steps: fewer steps, of equal length, and one call less at the clean end (even_path in
  diffusion/schedule.py). The unconditional output is extrapolated linearly from the step before,
  to the mean of the grid's time steps that a step leaves out; what guidance adds to it is not.
- merge_negatives: one negative in place of two, in the prediction as well. Perp-Neg is linear in
  w_1 n_1 + w_2 n_2, which is taken as (w_1 + w_2) n, n the output for the mean of both texts,
  weighted by w.
- reuse_negatives: the differences n_i - p of Perp-Neg's negatives to the positive output (eps or v,
  as the model gives it), evaluated every so many steps; in between a step has 2 conditions.
  Perp-Neg takes of n_i - u what is perpendicular to p - u, and n_i - u = (n_i - p) + (p - u):
  n_i - p says as much and is the smaller. With n_i - u the gradient was off four times as far.
- deep_cache: the deep feature (fast_unet/forward.py), recomputed every so many steps; in between
  only the outermost levels run (DeepCache, arXiv 2312.00858).

The first step and the prediction reuse nothing. What a step reuses depends on its place in its own
inversion alone, so that a sample gets the same in every batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Shortcuts
from ..types import SDIFastError
from .prompt import Condition

N_PLAIN = 2  # conditions without Perp-Neg's negatives, which come behind them
N_MERGED = 3  # with both as one


@dataclass(frozen=True)
class Call:
    """One call of the UNet."""

    full: bool  # with its deep part
    n_conditions: int


# Work of a call as a part of a full one with 4 conditions, counted by fast_unet/work.py on SD 2.1
# at 64 x 64 latents. A call of 2 conditions is more than half: what sees no text is shared.
SD21_COSTS: dict[Call, float] = {
    Call(True, 4): 1.0,
    Call(True, 3): 0.753,
    Call(True, 2): 0.507,
    Call(False, 4): 0.375,
    Call(False, 3): 0.285,
    Call(False, 2): 0.194,
}


def n_evaluated(n_conditions: int, shortcuts: Shortcuts) -> int:
    """How many conditions the UNet is asked for where nothing is reused."""
    return min(n_conditions, N_MERGED) if shortcuts.merge_negatives else n_conditions


def merged_texts(condition: Condition) -> Tensor:
    """The embeddings with both negatives as one, [3, B, T, D]; where both weigh 0, their mean."""
    assert condition.neg_weights is not None
    weights = condition.neg_weights.to(condition.embeddings.dtype)
    weights = weights.masked_fill(weights.sum(1, keepdim=True) == 0.0, 1.0)  # of one sign, or 0
    shares = (weights / weights.sum(1, keepdim=True)).T[:, :, None, None]  # [2, B, 1, 1]
    merged = (shares * condition.embeddings[N_PLAIN:]).sum(0, keepdim=True)
    return torch.cat([condition.embeddings[:N_PLAIN], merged])


def steps_ahead(
    stride: Tensor,  # [B] i64, time steps of a step, 0 after the last
    grid_stride: float,
) -> Tensor:
    """How far beyond its start, in steps, the grid's time steps within a step lie on average."""
    return (0.5 - 0.5 * grid_stride / stride).clamp(min=0.0)


def plan_calls(n_steps: int, n_conditions: int, shortcuts: Shortcuts) -> tuple[Call, ...]:
    """The calls of an inversion of `n_steps` and of the prediction, in order."""
    n_conditions = n_evaluated(n_conditions, shortcuts)
    calls: list[Call] = []
    age = rows = 0  # steps since the deep feature was computed, and for how many conditions
    for step in range(n_steps):
        skips = n_conditions > N_PLAIN and step % max(shortcuts.reuse_negatives, 1) > 0
        n = N_PLAIN if skips else n_conditions
        full = step == 0 or age >= max(shortcuts.deep_cache, 1) or rows < n
        if full:
            age, rows = 0, n
        age += 1
        calls.append(Call(full, n))
    return (*calls, Call(True, n_conditions))


def target_work(
    calls: Sequence[Call], n_conditions: int = 4, costs: Mapping[Call, float] = SD21_COSTS
) -> float:
    """UNet work of a target in full calls with all conditions.

    Args:
        calls: of `plan_calls`.
        n_conditions: of an exact call.
        costs: work of every kind of call, in any unit.
    """
    return sum(costs[call] for call in calls) / costs[Call(True, n_conditions)]


class ConditionedUNet:
    """A denoiser called with B latents for all K conditions, with text prepared once if it can.

    Takes any DenoiserLike; one that also has `prepare(context) -> cache` and
    `predict_prepared(x, t, cache)`, of B latents and K B rows of text, is asked that way.
    """

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.prepares = hasattr(denoiser, "prepare") and hasattr(denoiser, "predict_prepared")

    def prepare(
        self,
        embeddings: Tensor,  # [K, B, T, D]
    ) -> Any:
        """What `predict` takes for this text."""
        rows = embeddings.flatten(0, 1)
        return self.denoiser.prepare(rows) if self.prepares else rows

    def warm_up(self, x: Tensor, t: Tensor, cache: Any) -> None:
        """Lets the denoiser choose its kernels, where it does."""
        if self.prepares and hasattr(self.denoiser, "warm_up"):
            self.denoiser.warm_up(x, t, cache)

    def first(self, cache: Any, n_rows: int) -> Any:
        """The first rows of what `prepare` gave."""
        return cache.first(n_rows) if self.prepares else cache[:n_rows]

    def predict(
        self,
        x: Tensor,  # [B, C, h, w]
        t: Tensor,  # [B] i64
        cache: Any,
        n_conditions: int,
    ) -> Tensor:
        """The raw outputs, [K, B, C, h, w]."""
        k = n_conditions
        if self.prepares:
            outputs = self.denoiser.predict_prepared(x, t, cache)
        else:
            outputs = self.denoiser.predict(x.repeat(k, 1, 1, 1), t.repeat(k), cache)
        return outputs.unflatten(0, (k, x.shape[0]))


class PlannedUNet:
    """The calls of one target, one after another.

    Args:
        unet: the denoiser.
        condition: K conditions: positive, unconditional(, negative 1, negative 2).
        shortcuts: those that the calls were planned with.
    """

    def __init__(self, unet: ConditionedUNet, condition: Condition, shortcuts: Shortcuts) -> None:
        self.unet = unet
        self.n_conditions = n_evaluated(condition.n_conditions, shortcuts)  # E
        self.merges = self.n_conditions < condition.n_conditions
        self.cache = unet.prepare(merged_texts(condition) if self.merges else condition.embeddings)
        self.keeps_deep = shortcuts.deep_cache > 1
        self.keeps_away = shortcuts.reuse_negatives > 1 and self.n_conditions > N_PLAIN
        self._deep: Tensor | None = None  # [E * B, H, W, C]
        self._away: Tensor | None = None  # [E - 2, B, C, h, w], n_i - p
        self._uncond: Tensor | None = None  # [B, C, h, w], of the step before

    def warm_up(self, x: Tensor, t: Tensor, n_conditions: int) -> None:
        """Lets the denoiser choose its kernels for calls of so many conditions."""
        self.unet.warm_up(x, t, self._cache_of(n_conditions, len(x)))

    def _cache_of(self, n_conditions: int, batch: int) -> Any:
        if n_conditions == self.n_conditions:
            return self.cache
        return self.unet.first(self.cache, n_conditions * batch)

    def predict(
        self,
        x: Tensor,  # [B, C, h, w]
        t: Tensor,  # [B] i64
        call: Call,
        ahead: Tensor | None = None,  # [B] f32: by how many steps to extrapolate u
    ) -> Tensor:
        """The raw outputs of all K conditions, [K, B, C, h, w]."""
        outputs = self._evaluated(x, t, call)
        if ahead is not None:
            uncond = outputs[1].clone()  # a denoiser may give the same buffer again
            if self._uncond is not None:  # added to all alike, it leaves their differences
                outputs = outputs + ahead.to(x.dtype).view(-1, 1, 1, 1) * (uncond - self._uncond)
            self._uncond = uncond
        return torch.cat([outputs, outputs[-1:]]) if self.merges else outputs

    def _evaluated(self, x: Tensor, t: Tensor, call: Call) -> Tensor:
        """The same with merged negatives as one, [E, B, C, h, w]."""
        k = call.n_conditions
        n_rows = k * x.shape[0]
        cache = self._cache_of(k, x.shape[0])
        denoiser = self.unet.denoiser
        if not self.keeps_deep:
            outputs = self.unet.predict(x, t, cache, k)
        elif call.full:
            flat, self._deep = denoiser.predict_deep(x, t, cache)
            outputs = flat.unflatten(0, (k, x.shape[0]))
        else:
            assert self._deep is not None
            flat = denoiser.predict_shallow(x, t, cache, self._deep[:n_rows])
            outputs = flat.unflatten(0, (k, x.shape[0]))
        if not self.keeps_away:
            return outputs
        if k == self.n_conditions:
            self._away = outputs[N_PLAIN:] - outputs[0]
            return outputs
        assert self._away is not None
        return torch.cat([outputs, outputs[0] + self._away])


def check_shortcuts(denoiser: Any, shortcuts: Shortcuts, static: bool) -> None:
    """Raises SDIFastError where these cannot be taken."""
    if shortcuts.exact:
        return
    if not static:
        names = ", ".join(field.name for field in dataclasses.fields(shortcuts))
        raise SDIFastError(f"{names}: expected static = True with them")
    if shortcuts.deep_cache > 1 and not hasattr(denoiser, "predict_deep"):
        raise SDIFastError(
            'deep_cache: expected the denoiser "fast", which can be split, got '
            f"{getattr(denoiser, 'kind', type(denoiser).__name__)!r}"
        )
