"""Times of whole steps, by the clock: a step may return before the device is done with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROUND_SECONDS = 0.3  # of consecutive steps between two waits for the device
MOST_STEPS = 8  # in a round
N_WARM_UP = 4  # steps of ours at each t: compilation, choices of kernels, captures
Step = Callable[[int | None], Any]  # of a time step, or of the schedule's where None


@dataclass(frozen=True)
class StepTiming:
    """Milliseconds a step."""

    t: int | None  # None: over several
    median_ms: float
    low_ms: float  # of the fastest round
    high_ms: float
    rounds: int
    steps_a_round: int
    n_samples: float  # mean
    n_unet_calls: float  # mean


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(steps: Sequence[Callable[[], Any]], device: torch.device) -> tuple[float, list[Any]]:
    """Seconds of consecutive calls, until the device is done, and what they returned."""
    synchronize(device)
    begin = time.perf_counter()
    results = [step() for step in steps]
    synchronize(device)
    return time.perf_counter() - begin, results


def read(result: Any, name: str) -> float:
    """A number of a step's metrics, or of a dict like them."""
    value = result[name] if isinstance(result, Mapping) else getattr(result, name)
    return float(value)


def time_steps(
    step: Step, t: int | None, device: torch.device, *, rounds: int, warmup: int
) -> StepTiming:
    """Rounds of consecutive steps at `t`, after `warmup` of them."""
    seconds = 0.0
    for _ in range(max(warmup, 1)):
        seconds, _ = timed([lambda: step(t)], device)
    n = min(max(round(ROUND_SECONDS / max(seconds, 1e-4)), 1), MOST_STEPS)
    times: list[float] = []
    results: list[Any] = []
    for _ in range(rounds):
        seconds, results = timed([lambda: step(t)] * n, device)
        times.append(seconds / n * 1e3)
    return _summary(t, times, n, results)


def time_annealing(
    step: Step, path: Sequence[int], device: torch.device, *, rounds: int, warmup: bool
) -> StepTiming:
    """Rounds of one step at each of the time steps in `path`; the mean step of each round.

    Args:
        warmup: go through the path once before: each number of UNet calls may have a graph.
    """
    calls = [lambda t=t: step(t) for t in path]
    if warmup:
        timed(calls, device)
    times: list[float] = []
    results: list[Any] = []
    for _ in range(rounds):
        seconds, results = timed(calls, device)
        times.append(seconds / len(path) * 1e3)
    return _summary(None, times, len(path), results)


def time_workload(
    step: Step,
    t_steps: Sequence[int],
    path: Sequence[int],
    device: torch.device,
    *,
    rounds: int,
    path_rounds: int,
    warmup: int,
    warm_path: bool,
) -> list[StepTiming]:
    """`time_steps` at each of `t_steps`, then `time_annealing` over `path`."""
    timings = [time_steps(step, t, device, rounds=rounds, warmup=warmup) for t in t_steps]
    timings.append(time_annealing(step, path, device, rounds=path_rounds, warmup=warm_path))
    return timings


def _summary(t: int | None, times: list[float], n: int, results: list[Any]) -> StepTiming:
    samples = statistics.fmean(read(r, "n_samples") for r in results)
    calls = statistics.fmean(read(r, "n_unet_calls") for r in results)
    median = statistics.median(times)
    return StepTiming(t, median, min(times), max(times), len(times), n, samples, calls)


class Memory:
    """What is allocated and reserved on the GPU from here on; zeros without one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.allocated = self.reserved = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            self.allocated = torch.cuda.memory_allocated(device)
            self.reserved = torch.cuda.memory_reserved(device)
            torch.cuda.reset_peak_memory_stats(device)

    def forget_peak(self) -> None:
        """Makes `peak` speak of what comes from here on, beside what is held now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> dict[str, float]:
        """MiB beyond what there was at the beginning; what graphs hold is in "reserved"."""
        if self.device.type != "cuda":
            return {"peak_mib": 0.0, "reserved_mib": 0.0}
        allocated = torch.cuda.max_memory_allocated(self.device) - self.allocated
        reserved = torch.cuda.max_memory_reserved(self.device) - self.reserved
        return {"peak_mib": round(allocated / 2**20, 1), "reserved_mib": round(reserved / 2**20, 1)}
