"""The whole SDI step: ours exact, balanced and turbo against the official code's way.

    python benchmarks/bench_step.py [--quick] [--sections steps breakdown ...] [--only exact ...]

Stable Diffusion 2.1-base's size with random weights at 512 x 512 on a GPU, the bundled model at
64 x 64 elsewhere (a smoke test). Before a candidate is timed its losses and gradients have to agree
with the baseline's (step_check.py); one that fails, or cannot be had, leaves a line that says so.

steps: each candidate at three time steps and over the annealing; scene, view and with them the
number of samples stay as they are. breakdown: time by stage. idle: share of the time in which the
GPU does nothing. real: the official run's first steps. scaling: resolution, views, samples and
prompts at a time. deterministic: what equal bits cost. long: 1,000 steps of a run of that length.
A step returns before the GPU is done: times are by the clock around several steps and a wait.

Writes <out>/step_<gpu>.json after each section, keeping the other sections of a file that is there
for the same commit and GPU, and beside it a picture of the stages and a trace of some steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step_sections
import torch
from baseline import BaselineStep, official
from harness import RESULTS, conditions, gpu_slug, print_conditions, save
from step_check import check_candidate

from sdi_fast.bench.timing import Memory
from sdi_fast.bench.workload import (
    SPEED_NAMES,
    choose_workload,
    still,
    with_speed,
    without_noise,
)
from sdi_fast.config import Config
from sdi_fast.diffusion.pipeline import Pipeline
from sdi_fast.engine import Engine

BASELINE = "baseline"
CANDIDATES = (BASELINE, *SPEED_NAMES)
SECTIONS: dict[str, Callable[[Any], Any]] = {
    "steps": step_sections.steps,
    "breakdown": step_sections.breakdown,
    "idle": step_sections.idle,
    "real": step_sections.real,
    "scaling": step_sections.scaling,
    "deterministic": step_sections.deterministic,
    "long": step_sections.long,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--only", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--rounds", type=int, default=0, help="10, quick: 1")
    parser.add_argument("--long-steps", type=int, default=0, help="1000, quick: 2")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds, overall")
    parser.add_argument("--tolerance-factor", type=float, default=1.0, help="of the check's")
    parser.add_argument("--graphs", choices=("auto", "on", "off"), default="auto", help="engine's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="", help="of the results; step_<gpu>")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (1 if args.quick else 10)
    args.long_steps = args.long_steps or (2 if args.quick else 1000)
    return args


@dataclasses.dataclass
class Built:
    """A loaded model, and the memory as it was before."""

    pipeline: Pipeline
    memory: Memory


class Bench:
    """Models, checks and results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.time_limit
        self.device = torch.device(args.device)
        self.workload = choose_workload(self.device, quick=args.quick)
        self.name = args.name or f"step_{gpu_slug() if self.device.type == 'cuda' else 'cpu'}"
        self.picture = args.out / f"{self.name}.png"
        self.trace = args.out / f"step_trace_{self.name.removeprefix('step_')}.json.gz"
        self.failed = False
        self.left_out: dict[str, str] = {}  # what, and why
        self.checks: dict[str, Any] = {}
        self._checked: dict[str, bool] = {}
        self._built: dict[tuple[str, str], Built] = {}
        self.notes: list[str] = []

    # ---- time ---------------------------------------------------------------------------------

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def is_late(self, what: str) -> bool:
        """Whether the time is up; then `what` is named as left out."""
        if self.seconds_left() > 0:
            return False
        self.left_out[what] = "the time limit was reached before it began"
        print(f"  {what}: left out: {self.left_out[what]}")
        return True

    # ---- candidates ---------------------------------------------------------------------------

    def config(self, name: str) -> Config:
        """A candidate's, with real cameras, schedules and learning rates."""
        config = with_speed(
            self.workload.config, "exact" if name == BASELINE else name, self.device
        )
        if self.args.graphs != "auto":
            graphs: Any = {"graphs": self.args.graphs == "on"}
            config = dataclasses.replace(
                config, engine=dataclasses.replace(config.engine, **graphs)
            )
        return official(config) if name == BASELINE else config

    def built(self, name: str, *, anew: bool = False) -> Built:
        """The candidate's model; that of the baseline is loaded first, whatever the order.

        Args:
            anew: whether to let the one that is there go, with all graphs that it has captured.
        """
        if name != BASELINE:
            self.built(BASELINE)
        model = self.config(name).model
        key = (model.denoiser, model.encoder)
        if anew:
            self._built.pop(key, None)
        if key not in self._built:
            collect()
            begin = time.perf_counter()
            memory = Memory(self.device)
            pipeline = self.workload.pipeline(model, self.device)
            print(f"  model {'/'.join(key)}: {time.perf_counter() - begin:.1f} s")
            self._built[key] = Built(pipeline, memory)
        return self._built[key]

    def engine(self, name: str, config: Config) -> Any:
        """A BaselineStep or an Engine; either has step(t, delta)."""
        pipeline = self.built(name).pipeline
        if name != BASELINE:
            return Engine(config, pipeline=pipeline)
        made = BaselineStep(config, pipeline)
        self.notes += [note for note in made.notes if note not in self.notes]
        return made

    def names(self, among: tuple[str, ...] = CANDIDATES) -> list[str]:
        return [name for name in CANDIDATES if name in self.args.only and name in among]

    def check(self, name: str) -> bool:
        """Whether the candidate computes what the baseline does; looked at once."""
        if name not in self._checked:
            self._checked[name] = name == BASELINE
            if name != BASELINE:
                rows = self.guarded(f"{name}: check", lambda: self._check(name))
                self._checked[name] = rows is not None
                self.checks[name] = rows or self.left_out[f"{name}: check"]
        return self._checked[name]

    def _check(self, name: str) -> list[dict[str, Any]]:
        begin = time.perf_counter()
        baseline = self.engine(BASELINE, without_noise(still(self.config(BASELINE))))
        rows = check_candidate(
            without_noise(still(self.config(name))),
            self.built(name).pipeline,
            baseline,
            self.workload.t_steps,
            self.args.tolerance_factor,
        )
        print(f"  {name} against the baseline, {time.perf_counter() - begin:.1f} s:")
        for row in rows:
            losses = ", ".join(f"{k} {v:.1e}" for k, v in row["losses"].items())
            grads = ", ".join(f"{k} {v:.1e}" for k, v in row["gradients"].items())
            print(f"    t = {row['t']}: losses off by {losses}; gradients by {grads or '?'}")
        return rows

    def guarded(self, what: str, function: Callable[[], Any]) -> Any:
        """function(); where it fails `what` is named as left out, and the others go on: None."""
        try:
            return function()
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            self.left_out[what] = f"{type(error).__name__}: {error}".splitlines()[0][:400]
            print(f"  {what}: {self.left_out[what]}")
            return None
        finally:
            collect()

    def each(self, what: str, names: list[str], function: Callable[[str], Any]) -> dict[str, Any]:
        """function(name) of every candidate that passes its check, guarded, while there is time."""
        found = {}
        for name in names:
            label = f"{what}: {name}"
            if self.is_late(label) or not self.check(name):
                continue
            result = self.guarded(label, lambda name=name: function(name))
            if result is not None:
                found[name] = result
        return found


def collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def earlier(path: Path, here: dict[str, Any], workload: str) -> dict[str, Any]:
    """Sections and checks of a result of the same commit and machine that is there already."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    where = content.get("conditions", {})
    same = all(where.get(k) == here.get(k) for k in ("commit", "gpu", "cpu", "torch"))
    if not same or content.get("workload") != workload:
        print(f"{path.name}: of another commit, machine or workload: it is replaced")
        return {}
    return {name: content[name] for name in ("notes", "checks", *SECTIONS) if name in content}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # what was found is seen even after a kill
    bench = Bench(args)
    print_conditions(bench.name)
    path = args.out / f"{bench.name}.json"
    content: dict[str, Any] = {
        "workload": bench.workload.name,
        "graphs": args.graphs,
        **earlier(path, conditions(), bench.workload.name),
    }
    bench.notes += content.get("notes", [])
    bench.checks |= content.get("checks", {})
    for section in args.sections:
        if not bench.is_late(section):
            print(f"{section}, {bench.seconds_left():.0f} s left")
            begin = time.perf_counter()
            found = bench.guarded(section, lambda s=section: SECTIONS[s](bench))
            print(f"{section} took {time.perf_counter() - begin:.0f} s")
            if found is not None:
                content[section] = found
        content |= {"notes": bench.notes, "left_out": bench.left_out, "checks": bench.checks}
        save(bench.name, content, args.out)
    print(f"wrote {path}")
    print("".join(f"left out: {what}: {why}\n" for what, why in bench.left_out.items()), end="")
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
