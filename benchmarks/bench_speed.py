"""What the approximate inversions lose on the bundled model, and what they save by count.

    python benchmarks/bench_speed.py [--n-views 2] [--eta 0.0]    # minutes on one thread
    python benchmarks/bench_speed.py --runs DIR --modes exact balanced turbo --seeds 0 1

Ground truth views of the ten evaluation prompts are encoded (the posterior's mode) and inverted to
t; delta = 0. For every mode, three coarser grids beside them, and every t:

    residual   s(t)^2 mean((e - kappa)^2), eq. 8 in x0 units (methods.md F), e under the guidance of
               the prediction: the squared distance of the target from z
    own        the same with e under the guidance of the inversion, which kappa solves for
    gradient   |target - exact target| / |exact target - z|: how far the loss' gradient is off
    work       UNet calls' worth, counted on SD 2.1 (diffusion/shortcuts.py)

"fp8" approximates every UNet call instead (model.unet_linears), on a CPU by its reference numerics;
its work is counted as the exact one's.

With --runs whole runs are made instead, by bench_quality.py's code: IoU, rank and score of every
mode.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import bench_quality
import torch
import tyro
from harness import conditions
from torch import Tensor

from sdi_fast.config import SPEEDS, GuidanceConfig, Shortcuts, toyworld_config
from sdi_fast.diffusion.guide import cfg_convention, guided_output
from sdi_fast.diffusion.invert import n_unet_calls
from sdi_fast.diffusion.pipeline import Pipeline, load_pipeline
from sdi_fast.diffusion.prompt import Condition
from sdi_fast.diffusion.shortcuts import plan_calls, target_work
from sdi_fast.guidance import SDI
from sdi_fast.toyworld.evaluate import EVAL_PROMPTS, held_out_cameras
from sdi_fast.toyworld.renderer import render_scene
from sdi_fast.toyworld.scenes import parse_caption

RESULTS = Path(__file__).parent / "results"
FEWER = {f"{n} steps": n for n in (7, 5, 3)}  # the other way to save: exact on a coarser grid
MODES: dict[str, Shortcuts] = {
    "exact": Shortcuts(),
    "deep 3": Shortcuts(deep_cache=3),
    "negatives 3": Shortcuts(reuse_negatives=3),
    "deep 3, negatives 3": Shortcuts(deep_cache=3, reuse_negatives=3),
    "merged": Shortcuts(merge_negatives=True),
    "even 4": Shortcuts(even_steps=4),
    "turbo, deep 3": dataclasses.replace(SPEEDS["turbo"], deep_cache=3),
    **{name: shortcuts for name, shortcuts in SPEEDS.items() if name != "exact"},
    **{name: Shortcuts() for name in FEWER},
    "fp8": Shortcuts(),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    t: tuple[int, ...] = (250, 400, 615, 800, 980)
    modes: tuple[str, ...] = tuple(MODES)
    n_prompts: int = 10
    n_views: int = 2  # of each prompt, 1 to 8
    n_steps: int = 10  # of the inversion's grid; the bundled model's own is 5
    eta: float = 0.0  # entropy noise; the same for all modes
    scales: str = "own"  # "own": the bundled model's guidance; "paper": 7.5 and -7.5
    device: str = "cpu"
    runs: Path | None = None  # folder for whole runs instead
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1  # runs at a time
    name: str = "speed"  # of the file of results


def guidance_of(args: Args, mode: str) -> GuidanceConfig:
    config = toyworld_config().guidance
    if args.scales == "paper":
        config = dataclasses.replace(config, guidance_scale=7.5, inversion_guidance_scale=-7.5)
    return dataclasses.replace(
        config,
        static=True,
        inversion_n_steps=FEWER.get(mode, args.n_steps),
        inversion_eta=args.eta,
        **dataclasses.asdict(MODES[mode]),
    )


def scenes(args: Args, pipeline: Pipeline) -> tuple[Tensor, Condition]:
    """Latents of ground truth views, and their conditions, prompt by prompt in one batch."""
    latents, conditions_of = [], []
    size = pipeline.image_size
    cameras = held_out_cameras(height=size, width=size, device=args.device)
    for prompt in EVAL_PROMPTS[: args.n_prompts]:
        images, _ = render_scene(parse_caption(prompt), cameras)
        chosen = slice(None, None, max(len(images) // args.n_views, 1))
        images = images[chosen][: args.n_views].permute(0, 3, 1, 2).to(args.device)
        latents.append(pipeline.encoder.encode(images.float(), sample=False))
        angles = (v[chosen][: args.n_views] for v in (cameras.azimuth_deg, cameras.elevation_deg))
        conditions_of.append(pipeline.prompts.encode(prompt).condition(*angles, perp_neg=True))
    weights = [c.neg_weights for c in conditions_of if c.neg_weights is not None]
    embeddings = torch.cat([c.embeddings for c in conditions_of], dim=1)
    return torch.cat(latents), Condition(embeddings, torch.cat(weights))


def linears_of(mode: str) -> str:
    return "fp8" if mode == "fp8" else "exact"


@torch.no_grad()
def residuals(args: Args) -> list[dict[str, Any]]:
    config = dataclasses.replace(toyworld_config().model, denoiser="fast")
    exactly = load_pipeline(config, args.device)
    in_fp8 = load_pipeline(dataclasses.replace(config, unet_linears="fp8"), args.device)
    z, condition = scenes(args, exactly)
    batch, schedule = len(z), exactly.schedule
    exact: dict[int, Tensor] = {}
    rows = []
    for mode in dict.fromkeys(("exact", *args.modes)):
        guidance = guidance_of(args, mode)
        pipeline = in_fp8 if linears_of(mode) == "fp8" else exactly
        sdi = SDI(pipeline, guidance)
        for t in args.t:
            n_steps = n_unet_calls(schedule, t, guidance) - 1
            levels, zero = torch.full((batch,), t), torch.zeros(batch, dtype=torch.long)
            noise = torch.randn(
                n_steps, *z.shape, generator=torch.Generator().manual_seed(t)
            ).to(z) if args.eta else None  # fmt: skip
            out = sdi.target(z, condition, levels, None, delta=zero, eta_noise=noise)
            own = guided_output(
                pipeline.denoiser, out.latents_inverted, levels.to(z.device), condition,
                guidance.inversion_guidance_scale, cfg_convention(guidance),
            )  # fmt: skip
            _, e = schedule.split(out.latents_inverted, own, levels.to(z.device))
            variance = float(schedule.sigma(levels)[0] ** 2)
            exact.setdefault(t, out.target)
            off = (out.target - exact[t]).flatten(1).norm(dim=1)
            calls = plan_calls(n_steps, condition.n_conditions, MODES[mode])
            rows.append(
                {
                    "mode": mode,
                    "t": t,
                    "residual": variance * float((out.noise_pred - out.kappa).square().mean()),
                    "own": variance * float((e - out.kappa).square().mean()),
                    "gradient": float((off / (exact[t] - z).flatten(1).norm(dim=1)).mean()),
                    "work": target_work(calls),
                }
            )
            print("  " + "  ".join(f"{k} {_short(v)}" for k, v in rows[-1].items()), flush=True)
    return rows


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]], name: str) -> str:
    """`name` by mode and t, in markdown."""
    steps = list(dict.fromkeys(row["t"] for row in rows))
    lines = [
        f"| {name} | " + " | ".join(f"t = {t}" for t in steps) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        cells = [f"{row[name]:.3g}" for row in rows if row["mode"] == mode]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whole_runs(args: Args, folder: Path) -> None:
    """bench_quality.py for every mode, each in its own folder."""
    for mode in args.modes:
        settings = {
            "model.denoiser": "fast",
            "model.unet_linears": linears_of(mode),
            "guidance.static": True,
            **{f"guidance.{k}": v for k, v in dataclasses.asdict(MODES[mode]).items()},
            "guidance.inversion_n_steps": FEWER.get(mode, args.n_steps),
        }
        bench_quality.main(
            bench_quality.Args(
                out=folder / mode.replace(" ", "_"),
                n_prompts=args.n_prompts,
                seeds=args.seeds,
                jobs=args.jobs,
                device=args.device,
                options=tuple(f"{k}={json.dumps(v)}" for k, v in settings.items()),
            )
        )


def main(args: Args) -> None:
    if args.runs is not None:
        whole_runs(args, args.runs)
        return
    started = time.perf_counter()
    rows = residuals(args)
    for name in ("residual", "own", "gradient", "work"):
        print(f"\n{table(rows, name)}")
    settings = {k: v for k, v in dataclasses.asdict(args).items() if k != "runs"}
    report = {"conditions": conditions(), "args": settings, "rows": rows}
    report["seconds"] = round(time.perf_counter() - started, 1)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main(tyro.cli(Args))
