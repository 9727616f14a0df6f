"""The one benchmark harness: check the output, warm up, time interleaved, tell the conditions.

Candidates are timed in turn, round after round, so that a machine that other work slows down slows
all of them alike: trust the ratios of one run before its milliseconds. On a GPU a call can be timed
with its L2 cache cold, and its memory and kernels be told. Results go to
benchmarks/results/<name>.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdi_fast.bench.machine import machine, output_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FLUSH_BYTES = 256 << 20  # written to empty the L2 cache: several times the largest one
SLOW_EVERY = 4  # rounds; see `compare`


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate over its rounds."""

    name: str
    median_ms: float
    low_ms: float  # fastest round
    high_ms: float  # slowest round
    rounds: int
    ratio: float  # of the first candidate's time to this one's: median over rounds
    ratio_low: float
    ratio_high: float


def conditions() -> dict[str, Any]:
    """What a number has to stand beside: processor, versions, threads, commit.

    Where SDI_FAST_COMMIT is set, that is the commit: a copy may lie in some other repository, which
    knows nothing of changes either.
    """
    given = os.environ.get("SDI_FAST_COMMIT")
    changes = None if given else bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {
        **machine(),
        "commit": given or _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": changes,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def gpu_slug() -> str:
    """The GPU's name as file names have it, such as "h200"."""
    name = torch.cuda.get_device_name().lower().replace("nvidia", "")
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def _git(*args: str) -> str:  # "" for a copy without its repository
    return output_of("git", *args, cwd=ROOT)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    difference = (actual.detach().double() - expected.detach().double()).norm().item()
    return difference / max(expected.detach().double().norm().item(), 1e-30)


def check_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Relative L2 error; AssertionError above `tolerance`, so that nothing wrong is ever timed."""
    error = relative_error(actual, expected)
    if not error <= tolerance:
        raise AssertionError(f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}")
    return error


def compare(
    candidates: Sequence[tuple[str, Callable[[], Any]]],  # the first is what ratios refer to
    *,
    rounds: int = 10,
    warmup: int = 2,
    cold_l2: bool = False,  # GPU: empty the L2 cache before each timed call
    slow_ms: float = float("inf"),
) -> list[Timing]:
    """Times the candidates in turn, `rounds` times, after `warmup` calls each.

    A candidate that takes more than `slow_ms` is timed in every SLOW_EVERY-th round alone; its
    Timing says how many those were. Ratios come from rounds with both times.
    """
    slow = [False for _ in candidates]
    for _ in range(warmup):
        for i, (_, function) in enumerate(candidates):
            slow[i] = _time_ms(function) > slow_ms
    flush = _flusher() if cold_l2 else None
    rows: list[list[tuple[float, float]]] = [[] for _ in candidates]  # (base's time or 0, own)
    for k in range(rounds):
        base = 0.0
        for i, (_, function) in enumerate(candidates):
            if slow[i] and k % SLOW_EVERY:
                continue
            if flush is not None:
                flush()
            own = _time_ms(function)
            base = own if i == 0 else base
            rows[i].append((base, own))
    return [_summary(name, row) for (name, _), row in zip(candidates, rows, strict=True)]


def _flusher() -> Callable[[], Any] | None:
    """Empties the GPU's L2 cache by writing a large buffer."""
    if not torch.cuda.is_available():
        return None
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_


def _time_ms(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `function`, whose inputs stay where they are, and the results that it fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@torch.no_grad()
def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of `function` without gradients; returns its results."""
    graph, results = capture(function)

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes that a call allocates on the GPU beyond what was allocated before; 0 without one."""
    if not torch.cuda.is_available():
        function()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernel_table(function: Callable[[], Any], calls: int = 5) -> list[dict[str, Any]]:
    """Each GPU kernel of a call: its name, launches a call, us a call; the longest first."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    rows = [
        {"name": e.key, "calls": e.count / calls, "us": e.self_device_time_total / calls}
        for e in profiler.key_averages()
        if e.device_type == DeviceType.CUDA and e.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])


def _summary(name: str, row: list[tuple[float, float]]) -> Timing:
    ratios = [base / own for base, own in row if base > 0.0]
    times = [own for _, own in row]
    return Timing(
        name,
        statistics.median(times),
        min(times),
        max(times),
        len(times),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def report(name: str, timings: Sequence[Timing], extra: dict[str, Any]) -> Path:
    """Prints the table and writes benchmarks/results/<name>.json."""
    print_conditions(name)
    for key, value in extra.items():
        print(f"  {key}: {value}")
    print_timings(timings)
    rows = [dataclasses.asdict(t) for t in timings]
    return save(name, {**extra, "timings": rows})


def print_conditions(name: str) -> None:
    where = conditions()
    gpu = f"{where['gpu']}, driver {where['driver']}" if where["gpu"] else "no GPU"
    print(
        f"{name} | {where['cpu']} | {gpu} | torch {where['torch']} | "
        f"{where['threads']} threads | {where['commit']}"
    )


def print_timings(timings: Sequence[Timing]) -> None:
    print(f"{'':28}{'median ms':>11}{'low':>10}{'high':>10}{'speed-up':>11}{'(low - high)':>16}")
    for t in timings:
        spread = f"({t.ratio_low:.1f} - {t.ratio_high:.1f})"
        print(
            f"{t.name:28}{t.median_ms:11.2f}{t.low_ms:10.2f}{t.high_ms:10.2f}"
            f"{t.ratio:10.1f}x{spread:>16}"
        )


def save(name: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `content` beside the conditions to <folder>/<name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    whole = {"name": name, "conditions": conditions(), **content}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return path
