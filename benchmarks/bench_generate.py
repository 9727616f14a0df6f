"""From the command to the GLB: `sdi-fast generate` with the bundled model, each in a new process.

    python benchmarks/bench_generate.py [--runs 3] [--imports]

Every object's silhouettes and caption are compared with the ground truth, from the checkpoint that
the run left. The first run on a machine compiles kernels. --imports adds a run that tells the
seconds that each package takes to be imported: diffusers and transformers import much of what they
find installed, this package's requirements or not.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from harness import gpu_slug, print_conditions, save

from sdi_fast.checkpoint import load_latest
from sdi_fast.config_io import config_from_yaml
from sdi_fast.engine import Engine
from sdi_fast.toyworld.evaluate import evaluate_engine

MIN_IOU, MAX_RANK = 0.5, 1  # of a run of full length: far above chance, below the seeds' spread
MIN_IMPORT_SECONDS = 0.05  # of a package that is told


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run."""

    prompt: str = "a red mushroom"
    runs: int = 3
    steps: int = 0  # 0: the bundled model's own number; others are not held to the ground truth
    device: str = "auto"
    imports: bool = False
    name: str = ""  # of the file of results; generate_<gpu>
    options: tuple[str, ...] = ()  # of sdi-fast generate


def generate(args: Args, out: Path, **environment: str) -> tuple[float, str]:
    """When the command was given, and what it wrote to stderr."""
    command = [sys.executable, "-P", "-m", "sdi_fast.cli", "generate", args.prompt]
    command += ["--model", "toyworld", "--device", args.device, "--out", str(out)]
    command += ["--steps", str(args.steps)] if args.steps else []
    begin = time.time()
    done = subprocess.run(
        [*command, *args.options],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"sdi-fast generate ended with {done.returncode}: {done.stderr[-2000:]}")
    return begin, done.stderr


def measure(args: Args, out: Path) -> dict[str, Any]:
    """Seconds since the command, by what was there then, and the object's scores."""
    begin, _ = generate(args, out)
    end = time.time()
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    marks = {"folder": ".lock", "model loaded": "config.yaml", "GLB": "mesh.glb"}
    seconds = {what: (out / name).stat().st_mtime - begin for what, name in marks.items()}
    seconds |= {"end": end - begin, "in steps": metrics["seconds_in_steps"]}
    return {
        "seconds": {what: round(value, 2) for what, value in seconds.items()},
        "steps": metrics["steps"],
        "ran": metrics["ran"],
        **check(args, out),
    }


def check(args: Args, out: Path) -> dict[str, Any]:
    """How near the object is to the ground truth; AssertionError where it is too far."""
    checkpoint = load_latest(out)
    assert checkpoint is not None, f"{out}: no checkpoint"
    engine = Engine(config_from_yaml(out / "config.yaml"))
    engine.load_state_tensors(checkpoint.tensors)

    scores = evaluate_engine(engine, args.prompt)
    if not args.steps:
        good = scores["iou"] >= MIN_IOU and scores["rank"] <= MAX_RANK
        assert good, f"IoU {scores['iou']:.2f}, the caption's place {scores['rank']}"
    return {name: scores[name] for name in ("iou", "rank", "score")}


def import_seconds(stderr: str) -> dict[str, float]:
    """Each package's own seconds, the largest first, of -X importtime's lines."""
    found: collections.Counter[str] = collections.Counter()
    for line in stderr.splitlines():
        with contextlib.suppress(ValueError):
            microseconds, _, name = line.removeprefix("import time:").split("|")
            found[name.strip().split(".")[0]] += int(microseconds)
    seconds = {name: round(us / 1e6, 2) for name, us in found.most_common()}
    return {name: s for name, s in seconds.items() if s >= MIN_IMPORT_SECONDS}


def main(args: Args) -> None:
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    name = args.name or f"generate_{gpu_slug() if on_gpu else 'cpu'}"
    print_conditions(name)
    rows: list[dict[str, Any]] = []
    imports: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.runs):
            rows.append(measure(args, Path(folder) / str(i)))
            print(f"  run {i}: {rows[-1]}", flush=True)
        if args.imports:
            _, stderr = generate(args, Path(folder) / "imports", PYTHONPROFILEIMPORTTIME="1")
            imports = import_seconds(stderr)
            print(f"  imports, s: {imports}")
    content = {
        "prompt": args.prompt,
        "options": args.options,
        # without it every start compiles all of Python's modules
        "python_keeps_bytecode": not sys.dont_write_bytecode,
        "runs": rows,
        "import_seconds": imports,
    }
    print(f"wrote {save(name, content)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
