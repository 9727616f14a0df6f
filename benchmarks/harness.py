"""The one benchmark harness: check the output, warm up, time interleaved, tell the conditions.

Candidates are timed in turn, round after round, so that a machine that other work slows down slows
all of them alike: trust the ratios of one run before its milliseconds. Results go to
benchmarks/results/<name>.json.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdi_fast.ops import _native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
    """What a number has to stand beside: processor, versions, threads, commit."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    native = _native.build_info()
    if native.get("openmp_runtime"):  # which one, not where this machine keeps it
        native["openmp_runtime"] = Path(native["openmp_runtime"]).name
    return {
        "cpu": _cpu_name(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "native": native,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*args: str) -> str:
    try:
        run = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""  # an installed copy without its repository
    return run.stdout.strip()


def check_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Relative L2 error; AssertionError above `tolerance`, so that nothing wrong is ever timed."""
    difference = (actual.detach().double() - expected.detach().double()).norm().item()
    error = difference / max(expected.detach().double().norm().item(), 1e-30)
    if not error <= tolerance:
        raise AssertionError(f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}")
    return error


def compare(
    candidates: Sequence[tuple[str, Callable[[], Any]]],  # the first is what ratios refer to
    *,
    rounds: int = 10,
    warmup: int = 2,
) -> list[Timing]:
    """Times the candidates in turn, `rounds` times, after `warmup` calls each."""
    for _ in range(warmup):
        for _, function in candidates:
            function()
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds):
        for (_, function), row in zip(candidates, times, strict=True):
            row.append(_time_ms(function))
    return [_summary(name, row, times[0]) for (name, _), row in zip(candidates, times, strict=True)]


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


def _summary(name: str, row: list[float], base: list[float]) -> Timing:
    ratios = [b / t for b, t in zip(base, row, strict=True)]
    return Timing(
        name,
        statistics.median(row),
        min(row),
        max(row),
        len(row),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def report(name: str, timings: Sequence[Timing], extra: dict[str, Any]) -> Path:
    """Prints the table and writes benchmarks/results/<name>.json."""
    where = conditions()
    print(
        f"{name} | {where['cpu']} | {where['gpu'] or 'no GPU'} | torch {where['torch']} | "
        f"{where['threads']} threads | {where['commit']}"
    )
    for key, value in extra.items():
        print(f"  {key}: {value}")
    print(f"{'':28}{'median ms':>11}{'low':>10}{'high':>10}{'speed-up':>11}{'(low - high)':>16}")
    for t in timings:
        spread = f"({t.ratio_low:.1f} - {t.ratio_high:.1f})"
        print(
            f"{t.name:28}{t.median_ms:11.2f}{t.low_ms:10.2f}{t.high_ms:10.2f}"
            f"{t.ratio:10.1f}x{spread:>16}"
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    rows = [dataclasses.asdict(t) for t in timings]
    content = {"name": name, "conditions": where, **extra, "timings": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
