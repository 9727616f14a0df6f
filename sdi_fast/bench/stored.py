"""Results that were stored with the package, and how new ones compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).parent / "stored"  # in a wheel: benchmarks/results/step_*.json
SOURCE = Path(__file__).parents[2]  # of a checkout


@dataclass(frozen=True)
class Comparison:
    """One measured time beside a stored one."""

    device: str  # where the stored one was measured
    candidate: str
    t: int | None  # None: the mean over the annealing
    stored_ms: float
    ratio: float  # stored / measured: above 1, this device is the faster one


def result_folders() -> list[Path]:
    """Where stored results may be."""
    folders = [PACKAGED]
    if (SOURCE / "pyproject.toml").is_file():
        folders.append(SOURCE / "benchmarks" / "results")
    return [folder for folder in folders if folder.is_dir()]


def stored_results(folders: Sequence[Path] | None = None) -> Iterator[dict[str, Any]]:
    """The readable ones among <folder>/step_*.json, each file name once."""
    seen: set[str] = set()
    for folder in result_folders() if folders is None else folders:
        for path in sorted(folder.glob("step_*.json")):
            if path.name in seen:
                continue
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(content, dict) and isinstance(content.get("workload"), str):
                seen.add(path.name)
                yield content


def rows_of(content: Mapping[str, Any]) -> Iterator[tuple[str, int | None, float]]:
    """(candidate, t, median ms) of a result's section "steps"."""
    steps = content.get("steps")
    candidates = steps.get("candidates", {}) if isinstance(steps, dict) else {}
    for name, found in candidates.items():
        for row in found.get("timings", []):
            yield name, row["t"], float(row["median_ms"])


def compare_with_stored(
    workload: str,
    measured: Mapping[tuple[str, int | None], float],  # (candidate, t): ms
    folders: Sequence[Path] | None = None,
) -> list[Comparison]:
    """Every stored time of the same workload, candidate and t; the baseline's beside ours too."""
    found = []
    for content in stored_results(folders):
        if content["workload"] != workload:
            continue
        where = content.get("conditions", {})
        cpu = f"{where.get('cpu') or 'unknown'}, {where.get('threads')} threads"
        device = str(where.get("gpu") or cpu)
        for name, t, ms in rows_of(content):
            for (own, own_t), own_ms in measured.items():
                if own_t == t and name in (own, "baseline") and own_ms > 0.0:
                    found.append(Comparison(device, name, t, ms, ms / own_ms))
    return found
