"""Choices among kernels, made by measuring them on the shapes that come, or before.

`stored/` holds what was measured on some GPUs, one file a device: a user does not wait for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # several times the L2 of an H200
ROUNDS, CALLS = 4, 3
MAX_THREADS = 8  # that compile
KERNELS = 2  # to be raised when a candidate's speed or name changes: older files are ignored
STORED = Path(__file__).with_name("stored")


class Choices:
    """Remembers which candidate is fastest for each key; measures only while told to."""

    def __init__(self, stored: Mapping[str, str] | None = None) -> None:
        self.table: dict[Hashable, str] = {}
        self.times_us: dict[Hashable, dict[str, float]] = {}
        self.failures: dict[Hashable, dict[str, str]] = {}
        self.stored = dict(stored or {})  # str(key) -> candidate, from elsewhere; until it is met
        self.recalls = bool(self.stored)  # whether there were any
        self.timer: Timer | None = None

    def start(self, device: torch.device) -> None:
        """From here on new keys are measured; not in torch's deterministic mode, where two
        processes have to choose alike."""
        if not torch.are_deterministic_algorithms_enabled():
            self.timer = Timer(device)

    def stop(self) -> None:
        self.timer = None

    def pick(
        self,
        key: Hashable,
        candidates: Mapping[str, Callable[[], Tensor]],
        warm: Sequence[Tensor] = (),  # inputs that the kernel before has left in the cache
        compiled: Collection[str] = (),  # candidates that may be compiled beside each other
        *,
        measure: bool = True,  # False: only recalled, whatever start() has said
    ) -> Tensor:
        """The result of the candidate chosen for `key`; of the first where none is yet.

        Candidates must not change their inputs.
        """
        if key not in self.table and self.stored:
            self._recall(key, candidates)
        if measure and self.timer is not None and key not in self.table and len(candidates) > 1:
            self._measure(self.timer, key, candidates, warm, compiled)
        return candidates[self.table.get(key, next(iter(candidates)))]()

    def _recall(self, key: Hashable, candidates: Mapping[str, Callable[[], Tensor]]) -> None:
        """Takes the stored choice, if it is one here and runs."""
        name = self.stored.pop(str(key), "")
        if name not in candidates:
            return
        try:
            candidates[name]()
        except Exception as error:  # made with other versions of the libraries
            self.failures[key] = {name: _reason(error)}
        else:
            self.table[key] = name

    def _measure(
        self,
        timer: Timer,
        key: Hashable,
        candidates: Mapping[str, Callable[[], Tensor]],
        warm: Sequence[Tensor],
        compiled: Collection[str],
    ) -> None:
        times, failures = {}, {}
        self.timer = None  # for choices inside of the candidates: not from threads
        try:
            _call_in_threads([candidates[name] for name in compiled if name in candidates])
        finally:
            self.timer = timer
        idle = timer.measure(lambda: None, warm)
        for name, function in candidates.items():
            try:
                times[name] = timer.measure(function, warm) - idle
            except Exception as error:  # no kernel for the shape, a tile that does not fit, ...
                failures[name] = _reason(error)
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


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _call_in_threads(functions: Sequence[Callable[[], Tensor]]) -> None:
    """Calls all, to compile them; who fails will fail again where it is measured."""
    if len(functions) < 2:
        return
    cuda = torch.cuda.is_available()
    stream = torch.cuda.current_stream() if cuda else None

    @torch.no_grad()
    def call(function: Callable[[], Tensor]) -> None:
        try:
            with torch.cuda.stream(stream):  # with its device; nothing for None
                function()
        except Exception:
            pass

    n_threads = min(len(functions), os.cpu_count() or 1, MAX_THREADS)
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(call, functions))


def _file_of(device: torch.device) -> tuple[str, Path]:
    """A GPU's name, and where its choices are kept: H200 of any maker's board is "nvidia-h200"."""
    name = torch.cuda.get_device_name(device)
    return name, STORED / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def load_stored(device: torch.device) -> dict[str, str]:
    """What was measured on such a device; nothing where there is no file that fits."""
    if device.type != "cuda":
        return {}
    name, path = _file_of(device)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fits = found["device"] == name and found["kernels"] == KERNELS
        return {str(k): str(v) for k, v in found["choices"].items()} if fits else {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def store(choices: Choices, device: torch.device) -> Path:
    """Adds what was measured to the device's file."""
    name, path = _file_of(device)
    merged = load_stored(device) | {str(k): choices.table[k] for k in choices.times_us}
    content = {
        "device": name,
        "kernels": KERNELS,
        "torch": torch.__version__,
        "choices": dict(sorted(merged.items())),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


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
        function()  # compiles
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
