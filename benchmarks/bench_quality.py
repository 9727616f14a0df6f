"""Quality of finished runs with the bundled model: silhouettes and captions.

One process a run, so that runs use the cores side by side; with --jobs 0 one after another in this
process, which loads the model once (for a GPU):

    python benchmarks/bench_quality.py --out DIR    # the ten prompts, SDI
    python benchmarks/bench_quality.py --out DIR \\
        --methods sdi sds --n-prompts 3 --seeds 0 1 2

Writes DIR/results.json (one row a run, conditions beside them) and DIR/views.png (each run's
held-out views in colour and normals, below the ground truth of its prompt).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from harness import conditions
from PIL import Image, ImageDraw

from sdi_fast.config import ModelConfig, toyworld_config
from sdi_fast.diffusion.pipeline import Pipeline, load_pipeline
from sdi_fast.engine import Engine
from sdi_fast.toyworld.evaluate import EVAL_PROMPTS, evaluate_engine, held_out_cameras
from sdi_fast.toyworld.renderer import render_scene
from sdi_fast.toyworld.scenes import parse_caption


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run."""

    out: Path
    methods: tuple[Literal["sdi", "sds"], ...] = ("sdi",)
    n_prompts: int = 10
    seeds: tuple[int, ...] = (0,)
    steps: int = 0  # 0: the bundled model's own number
    jobs: int = 1  # runs at a time; 0: all in this process
    threads: int = 1  # CPU threads a run
    device: str = "cpu"
    options: tuple[str, ...] = ()  # stage.name=value, over the defaults; for experiments
    time_limit: float = 0.0  # seconds; runs not started by then are left out and said to be


def with_options(config: Any, options: tuple[str, ...]) -> Any:
    """`config` with "stage.name=json" settings replaced."""
    for option in options:
        key, text = option.split("=", 1)
        stage, name = key.split(".")
        value = json.loads(text)
        value = tuple(value) if isinstance(value, list) else value
        config = dataclasses.replace(
            config, **{stage: dataclasses.replace(getattr(config, stage), **{name: value})}
        )
    return config


@functools.cache
def shared_pipeline(config: ModelConfig, device: str) -> Pipeline:
    return load_pipeline(config, device)


def run_one(job: tuple[Args, str, str, int]) -> dict[str, Any]:
    """One run from the prompt to its scores; images come back as uint8."""
    args, prompt, method, seed = job
    torch.set_num_threads(args.threads)
    config = toyworld_config()
    config = config.with_steps(args.steps or config.engine.max_steps)
    config = dataclasses.replace(
        config,
        prompt=prompt,
        guidance=dataclasses.replace(config.guidance, method=method),
        engine=dataclasses.replace(
            config.engine, seed=seed, device=args.device, threads=args.threads
        ),
    )
    config = with_options(config, args.options)
    engine = Engine(config, pipeline=shared_pipeline(config.model, args.device))
    started = time.perf_counter()
    engine.run()
    seconds = time.perf_counter() - started

    scores = evaluate_engine(engine, prompt)
    views = engine.render(held_out_cameras(height=96, width=96, device=engine.device))
    images = torch.cat([views.comp_rgb, views.comp_normal], dim=1).clamp(0, 1)
    return {
        "prompt": prompt,
        "method": method,
        "seed": seed,
        "steps": engine.global_step,
        "seconds": seconds,
        "skipped": sum(row["skipped"] for row in engine.history),
        "loss_last_50": float(np.mean([row["loss"] for row in engine.history[-50:]])),
        **scores,
        "images": (images * 255).byte().cpu().numpy(),
    }


def contact_sheet(rows: list[dict[str, Any]], path: Path) -> None:
    """Ground truth and every run's colour and normal views, prompt by prompt."""
    strips: list[np.ndarray] = []
    labels: list[str] = []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        scene = parse_caption(prompt)
        truth, _ = render_scene(scene, held_out_cameras(height=96, width=96))
        strips.append(np.concatenate(list((truth.clamp(0, 1) * 255).byte().numpy()), axis=1))
        labels.append(f"{prompt}: ground truth")
        for row in (r for r in rows if r["prompt"] == prompt):
            strips.append(np.concatenate(list(row["images"]), axis=1))
            labels.append(
                f"{row['method']} seed {row['seed']}: IoU {row['iou']:.2f}, rank {row['rank']}"
            )
    bars = []
    for strip, label in zip(strips, labels, strict=True):
        bar = Image.new("RGB", (strip.shape[1], 14), "white")
        ImageDraw.Draw(bar).text((2, 1), label, fill="black")
        bars += [np.asarray(bar), strip]
    Image.fromarray(np.concatenate(bars)).save(path)


def main(args: Args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    jobs = [
        (args, prompt, method, seed)
        for prompt in EVAL_PROMPTS[: args.n_prompts]
        for seed in args.seeds
        for method in args.methods
    ]
    rows: list[dict[str, Any]] = []
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with contextlib.ExitStack() as stack:
        if args.jobs:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(args.jobs, maxtasksperchild=1))
            pending = pool.imap_unordered(run_one, jobs)
        for job in jobs:
            left = args.time_limit - (time.perf_counter() - started) if args.time_limit else None
            try:
                if not args.jobs and left is not None and left <= 0.0:
                    raise multiprocessing.TimeoutError
                row = pending.next(left) if args.jobs else run_one(job)
            except multiprocessing.TimeoutError:
                print(f"time limit: {len(jobs) - len(rows)} of {len(jobs)} runs are left out")
                break
            rows.append(row)
            print(
                f"{row['prompt']:32s} {row['method']} seed {row['seed']}: "
                f"IoU {row['iou']:.3f}  rank {row['rank']}  score {row['score']:.3f}  "
                f"{row['seconds']:.0f} s",
                flush=True,
            )
            save(args, rows)
    save(args, rows)


def save(args: Args, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda r: (r["prompt"], r["method"], r["seed"]))
    plain = [{k: v for k, v in row.items() if k != "images"} for row in rows]
    settings = {k: v for k, v in dataclasses.asdict(args).items() if k != "out"}
    report = {"conditions": conditions(), "args": settings, "runs": plain}
    (args.out / "results.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    if rows:
        contact_sheet(rows, args.out / "views.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
