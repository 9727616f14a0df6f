"""What the trainings share: a wall-clock budget, and AdamW with fp32 masters and an average."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

WARMUP = 0.02  # fraction of the budget
PRINT_EVERY_S = 10.0


class Budget:
    """A phase that ends by the clock, or after `max_steps`; its learning rate follows the time."""

    def __init__(self, name: str, seconds: float, peak_lr: float, max_steps: int = 0) -> None:
        self.name, self.seconds, self.peak_lr, self.max_steps = name, seconds, peak_lr, max_steps
        self.start = self.last_print = time.perf_counter()
        self.step = 0
        self.log: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def fraction(self) -> float:
        by_step = self.step / self.max_steps if self.max_steps else 0.0
        return min(max(self.elapsed / max(self.seconds, 1e-6), by_step), 1.0)

    @property
    def running(self) -> bool:
        return self.fraction < 1.0

    @property
    def lr(self) -> float:
        """Linear warm-up, then half a cosine down to 0."""
        f = self.fraction
        rise = min(max(f, 1e-3) / WARMUP, 1.0)
        return self.peak_lr * rise * 0.5 * (1.0 + math.cos(math.pi * f))

    def note(self, **values: Tensor) -> None:
        """Counts a step; prints and logs the mean values every PRINT_EVERY_S seconds."""
        self.step += 1
        for key, value in values.items():
            value = value.detach().float()
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._count += 1
        now = time.perf_counter()
        if now - self.last_print >= PRINT_EVERY_S or not self.running:
            self.last_print = now
            row = {key: float(total) / self._count for key, total in self._sums.items()}
            self.log.append({"step": self.step, "seconds": round(self.elapsed, 2), **row})
            shown = " ".join(f"{key} {value:.4f}" for key, value in row.items())
            print(f"[{self.name}] {self.elapsed:6.1f} s step {self.step} {shown}", flush=True)
            self._sums, self._count = {}, 0

    def summary(self) -> dict[str, Any]:
        return {"seconds": round(self.elapsed, 1), "steps": self.step, "log": self.log}


class MasterAdamW:
    """AdamW on fp32 copies of a model's parameters, with an exponential moving average.

    On a GPU the model itself computes in bfloat16: twice the speed of autocast here, whose fp32
    group norms dominate. `ema_to_model` ends the training: fp32 averages replace the parameters.
    """

    def __init__(
        self, modules: Iterable[nn.Module], weight_decay: float, ema_decay: float, low: bool
    ) -> None:
        self.modules = list(modules)
        self.params = [p for m in self.modules for p in m.parameters() if p.requires_grad]
        self.masters = [p.detach().clone().float() for p in self.params]
        self.averages = [m.clone() for m in self.masters]
        self.ema_decay, self.updates = ema_decay, 0
        if low:
            for module in self.modules:
                module.to(torch.bfloat16)
        fused = self.masters[0].is_cuda
        self.adam = torch.optim.AdamW(
            self.masters, lr=0.0, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused
        )

    @torch.no_grad()
    def step(self, lr: float, max_norm: float = 1.0) -> None:
        """One update from the parameters' gradients, which it clears."""
        for master, param in zip(self.masters, self.params, strict=True):
            grad = param.grad
            master.grad = torch.zeros_like(master) if grad is None else grad.float()
            param.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, max_norm, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        torch._foreach_copy_(list[Tensor](self.params), self.masters)
        self.updates += 1
        decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.masters, 1.0 - decay)

    def averaged_states(self) -> list[dict[str, Tensor]]:
        """The averages by parameter name, one dict a module."""
        average_of = {id(p): a for p, a in zip(self.params, self.averages, strict=True)}
        return [
            {name: average_of[id(p)] for name, p in module.named_parameters()}
            for module in self.modules
        ]

    @torch.no_grad()
    def ema_to_model(self) -> None:
        for module in self.modules:
            module.float()
        for param, average in zip(self.params, self.averages, strict=True):
            param.copy_(average)
