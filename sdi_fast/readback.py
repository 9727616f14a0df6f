"""The numbers of a step, read off its device without stopping it.

A step leaves one row of numbers on its device. On a GPU the row is copied to pinned memory behind
the step's kernels; whoever reads a number waits for that copy alone. On the CPU it is there at
once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

ROW_HEAD = ("loss", "n_samples", "skipped", "bad_steps")  # the unweighted losses follow, by name


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one step reports; plain numbers, no tensors."""

    step: int  # 0-based index of the step that was done
    loss: float  # weighted sum; NaN where the step was skipped for it
    t: int  # diffusion time step of the first view
    losses: dict[str, float]  # unweighted, by name
    n_samples: int  # samples that survived pruning
    n_unet_calls: int
    skipped: bool  # True: not finite, parameters unchanged
    seconds: float  # of the call; where steps are queued, its share of the time that all take
    bad_steps: int = 0  # skipped in a row, this one included

    @property
    def ready(self) -> bool:
        """Whether everything can be read without waiting for a device."""
        return True


class PendingMetrics(StepMetrics):
    """Metrics of a step that a GPU may still be at.

    `step`, `t`, `n_unet_calls` and `seconds` are known; reading anything else waits for the step.
    """

    def __init__(
        self, step: int, t: int, n_unet_calls: int, seconds: float, reading: Reading
    ) -> None:
        known = {"step": step, "t": t, "n_unet_calls": n_unet_calls, "seconds": seconds}
        for name, value in known.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "reading", reading)

    reading: Reading

    @property
    def ready(self) -> bool:
        return self.reading.ready

    def settled(self) -> StepMetrics:
        """The same with all numbers read; waits for them."""
        row = self.reading.read()
        losses = {name: value for name, value in row.items() if name not in ROW_HEAD}
        return StepMetrics(
            self.step, row["loss"], self.t, losses, int(row["n_samples"]), self.n_unet_calls,
            bool(row["skipped"]), self.seconds, int(row["bad_steps"]),
        )  # fmt: skip

    loss = property(lambda self: self.settled().loss)
    losses = property(lambda self: self.settled().losses)
    n_samples = property(lambda self: self.settled().n_samples)
    skipped = property(lambda self: self.settled().skipped)
    bad_steps = property(lambda self: self.settled().bad_steps)


class Reading:
    """One row on its way to the host.

    Args:
        row: [n] f64 on its device; may be overwritten afterwards by work on the current stream.
        names: what its numbers are called.
    """

    def __init__(self, row: Tensor, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._event: torch.cuda.Event | None = None
        self._values: dict[str, float] | None = None
        if row.is_cuda:
            self._host = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            self._host.copy_(row, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(row.device))
        else:
            self._host = row.clone()

    @property
    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> dict[str, float]:
        """The numbers by name; waits for the copy."""
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values = dict(zip(self.names, self._host.tolist(), strict=True))
        return self._values


class Snapshot:
    """Tensors on their way to the host, as they are at this point of the current stream.

    Args:
        state: by name; on a GPU they may be overwritten by later work on the current stream.
        finish: gives what else belongs to it, when everything has arrived.
    """

    def __init__(
        self, state: Mapping[str, Tensor], finish: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        self._finish = finish
        self._event: torch.cuda.Event | None = None
        self._host = {name: self._copy(value.detach()) for name, value in state.items()}
        on_gpu = [value.device for value in state.values() if value.is_cuda]
        if on_gpu:  # all on one, which need not be torch's current device
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(on_gpu[0]))

    @staticmethod
    def _copy(value: Tensor) -> Tensor:
        if not value.is_cuda:
            return value.clone().contiguous()
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value, non_blocking=True)

    def tensors(self) -> dict[str, Tensor]:
        """CPU tensors by name; waits until they are there. Any thread may call it."""
        if self._event is not None:
            self._event.synchronize()
        return {**self._host, **self._finish()}


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` from the host on `device`, without waiting for it."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
