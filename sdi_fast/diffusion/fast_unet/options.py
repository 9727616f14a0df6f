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
    "norm_splits": ("auto", "measured"),
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
    norm_splits: str = "auto"  # how many programs share a group of a group norm
    upsample: str = "phase"  # 4 convolutions of 2 x 2 taps in place of 9 taps on the large image
    cudnn_benchmark_limit: int = 10  # algorithms that cuDNN tries a shape; 0: all
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
        self.measuring = False

    def pick(self, key: Hashable, candidates: dict[str, Callable[[], Tensor]]) -> Tensor:
        """The result of the candidate chosen for `key`; of the first where none is yet.

        Candidates must not change their inputs. One that fails while measured is out.
        """
        name = self.table.get(key)
        if name is None:
            name = next(iter(candidates))
            if self.measuring and len(candidates) > 1:
                times = {n: t for n, f in candidates.items() if (t := _time_ms(f)) is not None}
                if not times:
                    raise RuntimeError(f"no candidate for {key} runs: {', '.join(candidates)}")
                name = min(times, key=lambda n: times[n])
                self.table[key], self.times_ms[key] = name, times
        return candidates[name]()

    def summary(self) -> dict[str, dict[str, Any]]:
        """What was chosen and how long each candidate took, for a benchmark's record."""
        return {
            str(key): {"chosen": name, "ms": {n: round(t, 4) for n, t in times.items()}}
            for key, name in self.table.items()
            if (times := self.times_ms[key])
        }


def _time_ms(function: Callable[[], Tensor], rounds: int = 5, calls: int = 4) -> float | None:
    """Fastest round's milliseconds a call; None where it cannot run.

    A round is replayed from a graph where it can be captured: what counts later is the device's
    time, not the host's.
    """
    try:
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
    except RuntimeError:  # an attention backend without a kernel for the shape, and the like
        torch.cuda.synchronize()
        return None
