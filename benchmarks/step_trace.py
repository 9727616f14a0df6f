"""What the GPU does and when: kernels from torch.profiler, the share of time without any."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

MAX_NAME = 60  # characters of a kernel's name in a stored trace
MAX_BYTES = 2 << 20  # of a stored trace


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One interval on the GPU: a kernel, a copy or a fill."""

    name: str
    start_ns: int
    end_ns: int
    stream: int


def gpu_kernels(function: Callable[[], Any]) -> list[Kernel]:
    """Everything that the GPU did in a call, in order of its start."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    found = _from_kineto(profiler)
    return sorted(found, key=lambda kernel: kernel.start_ns)


def _from_kineto(profiler: Any) -> list[Kernel]:
    """The raw events, without the tree that `profiler.events()` builds of them: it takes minutes
    for a million of them."""
    from torch.autograd import DeviceType

    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None or not hasattr(results, "events"):
        return [
            Kernel(e.name, int(e.time_range.start * 1e3), int(e.time_range.end * 1e3), 0)
            for e in profiler.events()
            if e.device_type == DeviceType.CUDA
        ]
    kernels = []
    for event in results.events():
        if event.device_type() != DeviceType.CUDA or event.duration_ns() <= 0:
            continue
        if hasattr(event, "is_user_annotation") and event.is_user_annotation():
            continue
        begin = event.start_ns()
        stream = event.device_resource_id()
        kernels.append(Kernel(event.name(), begin, begin + event.duration_ns(), stream))
    return kernels


def busy_ns(kernels: Sequence[Kernel]) -> int:
    """Length of the union of the intervals."""
    total, reached = 0, None
    for kernel in sorted(kernels, key=lambda k: k.start_ns):
        begin = kernel.start_ns if reached is None else max(kernel.start_ns, reached)
        total += max(kernel.end_ns - begin, 0)
        reached = kernel.end_ns if reached is None else max(reached, kernel.end_ns)
    return total


def span_ns(kernels: Sequence[Kernel]) -> int:
    """From the first start to the last end."""
    if not kernels:
        return 0
    return max(k.end_ns for k in kernels) - min(k.start_ns for k in kernels)


def busy_ms(function: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Milliseconds in which the GPU works, and kernels, a call."""

    def repeated() -> None:
        for _ in range(calls):
            function()

    kernels = gpu_kernels(repeated)
    return busy_ns(kernels) / calls / 1e6, len(kernels) / calls


def save_trace(path: Path, kernels: Sequence[Kernel], label: str) -> int:
    """The last of `kernels` as a Chrome trace that fits MAX_BYTES; how many there are in it."""
    kept = list(kernels)
    while True:
        origin = kept[0].start_ns if kept else 0
        events = [
            {
                "ph": "X",
                "name": kernel.name[:MAX_NAME],
                "pid": 0,
                "tid": kernel.stream,
                "ts": (kernel.start_ns - origin) / 1e3,
                "dur": (kernel.end_ns - kernel.start_ns) / 1e3,
            }
            for kernel in kept
        ]
        text = json.dumps({"traceEvents": events, "label": label}, separators=(",", ":"))
        packed = gzip.compress(text.encode(), mtime=0)
        if len(packed) < MAX_BYTES or not kept:
            break
        kept = kept[len(kept) // 2 :]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed)
    return len(kept)


def idle_share(
    step: Callable[[int], Any], path: Sequence[int], window: int, keep_steps: int
) -> tuple[dict[str, Any], list[Kernel]]:
    """GPU idle share over a step at each t of `path`, in windows; the last steps' kernels."""
    busy = span = n = 0
    last: list[Kernel] = []
    for begin in range(0, len(path), window):
        part = path[begin : begin + window]

        def run(part: Sequence[int] = part) -> None:
            for t in part:
                step(t)

        kernels = gpu_kernels(run)
        busy, span, n = busy + busy_ns(kernels), span + span_ns(kernels), n + len(kernels)
        first = len(kernels) - round(len(kernels) * keep_steps / len(part))
        last = kernels[max(first, 0) :]
    share = 1.0 - busy / span if span else float("nan")
    found = {
        "steps": len(path),
        "window": window,
        "idle_share": share,
        "busy_ms": busy / len(path) / 1e6,
        "span_ms": span / len(path) / 1e6,
        "kernels": n / len(path),
    }
    return found, last
