"""Adam over named groups of parameters (methods.md D, Optimiser)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.adam import adam_step
from .types import SDIFastError


@dataclass
class ParamGroup:
    """Parameters that share a learning rate."""

    params: dict[str, Tensor]
    lr: float


class Adam:
    """Bias-corrected Adam, one step counter for all parameters.

    A parameter without a gradient counts as having a zero one, so that its momentum carries on:
    that is what the official code does in steps whose shading ignores the albedo.

    Args:
        groups: name -> (parameters by name, learning rate).
        backend: of the op, see `sdi_fast.ops`.

    Raises:
        SDIFastError: for a rate, a beta or an eps out of range, or a parameter in two groups.
    """

    def __init__(
        self,
        groups: Mapping[str, tuple[Mapping[str, Tensor], float]],
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-15,
        backend: str = "auto",
    ) -> None:
        self.groups = {name: ParamGroup(dict(params), lr) for name, (params, lr) in groups.items()}
        self.betas = betas
        self.eps = eps
        self.backend = backend
        self._check()
        # on the parameters' device, so that a step that is skipped there does not count
        devices = {p.device for _, p, _ in self._named()}
        self._n_steps = torch.zeros((), dtype=torch.int64, device=next(iter(devices), None))
        self._exp_avg = {name: torch.zeros_like(p) for name, p, _ in self._named()}
        self._exp_avg_sq = {name: torch.zeros_like(p) for name, p, _ in self._named()}

    @property
    def n_steps(self) -> int:
        """Updates so far, skipped ones excluded. Waits for the device."""
        return int(self._n_steps)

    def parameters(self) -> list[Tensor]:
        """All parameters, in the order that `step` takes gradients in."""
        return [param for _, param, _ in self._named()]

    @torch.no_grad()
    def step(
        self, grads: Sequence[Tensor | None] | None = None, *, skip: Tensor | None = None
    ) -> None:
        """One update of every parameter. Never waits for the device.

        Args:
            grads: one a parameter, in the order of `parameters()`; each one's `.grad` where None.
            skip: [] bool on the parameters' device; where true, nothing changes.
        """
        params = self.parameters()
        grads = [p.grad for p in params] if grads is None else grads
        if len(grads) != len(params):
            raise SDIFastError(f"grads: expected {len(params)} gradients, got {len(grads)}")
        self._n_steps.add_(1 if skip is None else ~skip)
        for (name, param, lr), grad in zip(self._named(), grads, strict=True):
            adam_step(
                param.detach(),
                torch.zeros_like(param) if grad is None else grad,
                self._exp_avg[name],
                self._exp_avg_sq[name],
                self._n_steps,
                lr,
                self.betas,
                self.eps,
                skip=skip,
                backend=self.backend,
            )

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for _, param, _ in self._named():
            param.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """ "step", and "exp_avg.GROUP.NAME" and "exp_avg_sq.GROUP.NAME" of each parameter."""
        state = {"step": self._n_steps}
        state.update({f"exp_avg.{name}": value for name, value in self._exp_avg.items()})
        state.update({f"exp_avg_sq.{name}": value for name, value in self._exp_avg_sq.items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state of `state_dict`.

        Raises:
            SDIFastError: for a missing or superfluous tensor or another shape; nothing is changed
                then.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            odd = sorted(state.keys() ^ own.keys())[0]
            verb = "missing" if odd in own else "not expected"
            raise SDIFastError(f"optimizer: tensor {odd!r} is {verb}")
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise SDIFastError(
                    f"optimizer: {name}: expected shape {list(value.shape)}, "
                    f"got {list(state[name].shape)}"
                )
        self._n_steps.copy_(state["step"])
        for name in self._exp_avg:
            self._exp_avg[name].copy_(state[f"exp_avg.{name}"])
            self._exp_avg_sq[name].copy_(state[f"exp_avg_sq.{name}"])

    def _named(self) -> Iterator[tuple[str, Tensor, float]]:
        """("GROUP.NAME", parameter, learning rate) of all parameters."""
        for group_name, group in self.groups.items():
            for name, param in group.params.items():
                yield f"{group_name}.{name}", param, group.lr

    def _check(self) -> None:
        seen: set[int] = set()
        for name, param, lr in self._named():
            if id(param) in seen:
                raise SDIFastError(f"groups: parameter {name!r} is in more than one place")
            seen.add(id(param))
            if not lr >= 0:
                raise SDIFastError(f"groups: learning rate of {name!r}: expected >= 0, got {lr}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise SDIFastError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if not self.eps >= 0:
            raise SDIFastError(f"eps: expected a number >= 0, got {self.eps}")
