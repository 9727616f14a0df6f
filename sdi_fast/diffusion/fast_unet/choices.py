"""Choices among kernels, made by measuring them on the shapes that come."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # several times the L2 of an H200
ROUNDS, CALLS = 5, 4


class Choices:
    """Remembers which candidate is fastest for each key; measures only while told to."""

    def __init__(self) -> None:
        self.table: dict[Hashable, str] = {}
        self.times_us: dict[Hashable, dict[str, float]] = {}
        self.failures: dict[Hashable, dict[str, str]] = {}
        self.timer: Timer | None = None

    def start(self, device: torch.device) -> None:
        """From here on new keys are measured."""
        self.timer = Timer(device)

    def stop(self) -> None:
        self.timer = None

    def pick(
        self,
        key: Hashable,
        candidates: Mapping[str, Callable[[], Tensor]],
        warm: Sequence[Tensor] = (),  # inputs that the kernel before has left in the cache
    ) -> Tensor:
        """The result of the candidate chosen for `key`; of the first where none is yet.

        Candidates must not change their inputs.
        """
        if self.timer is not None and key not in self.table and len(candidates) > 1:
            self._measure(self.timer, key, candidates, warm)
        return candidates[self.table.get(key, next(iter(candidates)))]()

    def _measure(
        self,
        timer: Timer,
        key: Hashable,
        candidates: Mapping[str, Callable[[], Tensor]],
        warm: Sequence[Tensor],
    ) -> None:
        times, failures = {}, {}
        idle = timer.measure(lambda: None, warm)
        for name, function in candidates.items():
            try:
                times[name] = timer.measure(function, warm) - idle
            except Exception as error:  # no kernel for the shape, a tile that does not fit, ...
                failures[name] = f"{type(error).__name__}: {str(error)[:200]}"
        if not times:
            raise RuntimeError(f"no candidate for {key} runs: {failures}")
        self.table[key] = min(times, key=lambda name: times[name])
        self.times_us[key], self.failures[key] = times, failures

    def summary(self) -> dict[str, dict[str, Any]]:
        """What was chosen, how long each candidate took, and which failed; for a record."""
        return {
            str(key): {
                "chosen": name,
                "us": {n: round(t, 1) for n, t in self.times_us[key].items()},
                **({"failed": self.failures[key]} if self.failures[key] else {}),
            }
            for key, name in self.table.items()
            if key in self.times_us
        }


class Timer:
    """Device time of a call as in the network: weights in memory, activations in the cache.

    Calls are replayed from a graph, so that launching them costs nothing, each after the L2 has
    been flushed and the warm inputs have been read again.
    """

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self.last: torch.cuda.CUDAGraph | None = None  # keeps the graphs' shared memory alive

    def measure(self, function: Callable[[], Any], warm: Sequence[Tensor]) -> float:
        """Microseconds a call, the flush included; the fastest of some rounds."""
        for _ in range(2):
            function()
        graph = self._capture(function, warm)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        times = []
        for _ in range(ROUNDS):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / CALLS)
        return min(times)

    def _capture(self, function: Callable[[], Any], warm: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        # not torch.cuda.graph: that collects garbage and empties the cache each time
        graph = torch.cuda.CUDAGraph()
        pool = () if self.last is None else (self.last.pool(),)
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(*pool)
            try:
                for _ in range(CALLS):
                    self.flush.zero_()
                    for tensor in warm:
                        tensor.clone()
                    function()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        self.last = graph
        return graph
