"""What can be chosen about the fast UNet, and choices made by measurement."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...types import SDIFastError

CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("eager", "compile"),
    "kernels": ("auto", "triton", "reference"),
    "attention": ("measured", "default", "flash", "cudnn", "efficient", "math"),
    "conv": ("cudnn", "measured", "triton"),
    "geglu": ("separate", "measured", "fused"),
    "norms": ("auto", "measured"),
    "upsample": ("phase", "nearest"),
}


@dataclass(frozen=True)
class FastUNetOptions:
    """How the fast UNet computes. "measured" times the candidates per shape in `warm_up`."""

    mode: str = "eager"  # "compile": torch.compile; leave CUDA graphs to CapturedUNet
    compile_mode: str | None = None  # torch.compile's mode
    kernels: str = "auto"  # norms, GEGLU and interleaving; in compile mode "auto" is "reference"
    attention: str = "measured"  # backend of scaled_dot_product_attention
    conv: str = "cudnn"  # 3 x 3 convolutions of stride 1
    geglu: str = "separate"  # after the matrix product, or inside of it
    norms: str = "auto"  # how many programs share a group of a group norm, and their size
    upsample: str = "phase"  # 4 convolutions of 2 x 2 taps in place of 9 taps on the large image
    cudnn_benchmark_limit: int = 10  # algorithms that cuDNN tries a shape; 0: all
    graphs: bool = True  # make_denoiser captures the calls on a GPU, one graph a shape
    n_train_steps: int = 1000
    n_negative_steps: int = 100  # the inversion asks for t down to -99 (methods.md G9)

    def __post_init__(self) -> None:
        for field in fields(self):
            allowed = CHOICES.get(field.name)
            value = getattr(self, field.name)
            if allowed is not None and value not in allowed:
                raise SDIFastError(f"{field.name}: expected {', '.join(allowed)}, got {value!r}")


class Choices:
    """Remembers which candidate is fastest for each key; measures only while told to."""

    def __init__(self) -> None:
        self.table: dict[Hashable, str] = {}
        self.times_ms: dict[Hashable, dict[str, float]] = {}
        self.failures: dict[Hashable, dict[str, str]] = {}
        self.measuring = False

    def pick(self, key: Hashable, candidates: dict[str, Callable[[], Tensor]]) -> Tensor:
        """The result of the candidate chosen for `key`; of the first where none is yet.

        Candidates must not change their inputs.
        """
        if self.measuring and key not in self.table and len(candidates) > 1:
            self._measure(key, candidates)
        return candidates[self.table.get(key, next(iter(candidates)))]()

    def _measure(self, key: Hashable, candidates: dict[str, Callable[[], Tensor]]) -> None:
        times, failures = {}, {}
        for name, function in candidates.items():
            try:
                times[name] = _time_ms(function)
            except Exception as error:  # no kernel for the shape, a tile that does not fit, ...
                torch.cuda.synchronize()
                failures[name] = f"{type(error).__name__}: {str(error)[:200]}"
        if not times:
            raise RuntimeError(f"no candidate for {key} runs: {failures}")
        self.table[key] = min(times, key=lambda name: times[name])
        self.times_ms[key], self.failures[key] = times, failures

    def summary(self) -> dict[str, dict[str, Any]]:
        """What was chosen, how long each candidate took, and which failed; for a record."""
        return {
            str(key): {
                "chosen": name,
                "us": {n: round(1e3 * t, 1) for n, t in self.times_ms[key].items()},
                **({"failed": self.failures[key]} if self.failures[key] else {}),
            }
            for key, name in self.table.items()
            if key in self.times_ms
        }


def _time_ms(function: Callable[[], Tensor], rounds: int = 5, calls: int = 4) -> float:
    """Fastest round's milliseconds a call, replayed from a graph: what counts is device time."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(rounds):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return min(times)
