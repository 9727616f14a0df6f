"""`sdi-fast bench`: the time of a step on this device, beside stored ones."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..engine import Engine, resolve_device
from .machine import machine
from .stored import Comparison, compare_with_stored
from .timing import N_WARM_UP, Memory, StepTiming, time_workload
from .workload import Workload, choose_workload, still, with_speed


def run_bench(
    console: Console,
    *,
    speed: str = "exact",
    quick: bool = False,
    as_json: bool = False,
    device: str = "auto",
) -> int:
    """Measures and prints; the exit code."""
    where = resolve_device(device)
    workload = choose_workload(where, quick=quick)
    if not as_json:
        console.print(_headline(workload, where, speed), markup=False, soft_wrap=True)
    report = measure(workload, where, speed, quick=quick)
    if as_json:
        print(json.dumps(report, indent=1))
        return 0
    timings = [StepTiming(**row) for row in report["timings"]]
    console.print(_table(timings))
    mean = timings[-1].median_ms
    steps = workload.config.engine.max_steps
    lines = [f"{steps} steps of this: {mean * steps / 6e4:.1f} min"]
    if where.type == "cuda":
        lines.append(f"GPU memory: {report['peak_mib']:.0f} MiB at most")
    rows = [Comparison(**row) for row in report["stored"]]
    lines += [_sentence(row) for row in rows]
    if not rows:
        lines.append(f"no stored results of the workload {workload.name} to compare with")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    return 0


def measure(
    workload: Workload, device: torch.device, speed: str, *, quick: bool = False
) -> dict[str, Any]:
    """Times, memory, machine and comparisons, as plain containers."""
    config = with_speed(still(workload.config), speed, device)
    memory = Memory(device)
    pipeline = workload.pipeline(config.model, device)
    memory.forget_peak()  # loading takes more than running
    engine = Engine(config, pipeline=pipeline)
    rounds = 2 if quick else 10
    t_steps = workload.t_steps[-1:] if quick else workload.t_steps
    timings = time_workload(
        engine.step,
        t_steps,
        workload.annealing(),
        device,
        rounds=rounds,
        path_rounds=1 if quick else 3,
        warmup=1 if quick else N_WARM_UP,
        warm_path=device.type == "cuda",
    )
    stored = compare_with_stored(
        workload.name, {(speed, timing.t): timing.median_ms for timing in timings}
    )
    return {
        "workload": workload.name,
        "speed": speed,
        "version": __version__,
        "machine": machine(device),
        "ran": engine.ran,
        "timings": [dataclasses.asdict(timing) for timing in timings],
        **memory.peak(),
        "stored": [dataclasses.asdict(row) for row in stored],
    }


def _headline(workload: Workload, device: torch.device, speed: str) -> str:
    facts = machine(device)
    what = {
        "sd21-512": "Stable Diffusion 2.1's size, random weights, 512 x 512",
        "toyworld-64": "the bundled model, 64 x 64",
    }.get(workload.name, "a tiny scene with the bundled model")
    where = facts["gpu"] if device.type == "cuda" else f"{facts['cpu']}, {facts['threads']} threads"
    return f"one step of {what}; speed {speed}; {where}; torch {facts['torch']}"


def _table(timings: list[StepTiming]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("t", "ms a step", "fastest", "slowest", "samples", "UNet calls"):
        table.add_column(title, justify="right")
    for timing in timings:
        table.add_row(
            _level(timing.t),
            f"{timing.median_ms:.1f}",
            f"{timing.low_ms:.1f}",
            f"{timing.high_ms:.1f}",
            f"{timing.n_samples:,.0f}",
            f"{timing.n_unet_calls:.1f}",
        )
    return table


def _level(t: int | None) -> str:
    return "980 to 250" if t is None else str(t)


def _sentence(row: Comparison) -> str:
    level = f"mean over t = {_level(None)}" if row.t is None else f"t = {row.t}"
    ratio = max(row.ratio, 1.0 / row.ratio)
    verb = "faster" if row.ratio >= 1.0 else "slower"
    here = f"here {ratio:.2f}x {verb}" if ratio >= 1.005 else "here as fast"
    return f"stored: {row.device}, {row.candidate}, {level}: {row.stored_ms:.1f} ms; {here}"
