"""Trains the bundled pipeline: `python -m sdi_fast.toyworld.train --out DIR`.

Each phase stops by the wall clock. --resume takes a folder (either form of models.save_weights)
to start from; a phase of 0 seconds keeps what was resumed. --flat writes four weight files, the
log and the grid side by side, for carrying; --pack turns such a folder into a pipeline folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..types import SDIFastError
from .card import write_card
from .dataset import build_dataset, camera_ranges
from .models import WEIGHT_FILES, load_weights, new_pipeline, save_weights
from .phases import UNET_LR, Settings, train_scorer, train_unet, train_vae
from .sample import sample_grid

LOG_NAME, GRID_NAME = "train_log.json", "samples.png"
RESERVE_S = 20.0  # of --total-seconds, for encoding, measuring, saving and sampling
SMOKE = Settings(
    n_images=192,
    vae_batch=8,
    unet_batch=8,
    scorer_batch=16,
    n_holdout=32,
    max_steps=4,
    low_precision=False,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sdi_fast.toyworld.train", description=__doc__)
    parser.add_argument("--out", required=True, help="folder to write the pipeline to")
    parser.add_argument("--resume", help="folder with weights to start from")
    parser.add_argument("--pack", help="only turn this flat folder into a pipeline folder")
    parser.add_argument("--vae-seconds", type=float, default=90.0)
    parser.add_argument("--unet-seconds", type=float, default=330.0)
    parser.add_argument("--scorer-seconds", type=float, default=45.0)
    parser.add_argument("--total-seconds", type=float, default=0.0, help="0: no limit in all")
    parser.add_argument("--images", type=int, default=0, help="size of the training set")
    parser.add_argument("--unet-batch", type=int, default=0)
    parser.add_argument("--unet-lr", type=float, default=UNET_LR, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the networks; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--flat", action="store_true", help="write the carrying form")
    parser.add_argument("--smoke", action="store_true", help="a few steps on few images")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    settings = SMOKE if args.smoke else Settings()
    low = settings.low_precision and args.device != "cpu"
    if args.precision != "auto":
        low = args.precision == "bfloat16"
    settings = replace(settings, compile=args.compile, low_precision=low, unet_lr=args.unet_lr)
    if args.images:
        settings = replace(settings, n_images=args.images)
    if args.unet_batch:
        settings = replace(settings, unet_batch=args.unet_batch)
    if settings.n_images <= settings.n_holdout:
        raise SDIFastError(
            f"images: expected more than the {settings.n_holdout} held out, got {settings.n_images}"
        )
    return settings


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the phases and writes the folder; returns the log."""
    started = time.perf_counter()
    settings = settings_of(args)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = new_pipeline(scratch if args.flat else out)
    resumed = load_weights(pipeline, args.resume) if args.resume else []
    for part in pipeline.parts().values():
        part.to(args.device)
    log: dict[str, Any] = {
        "settings": vars(settings),
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "resumed": resumed,
        "cameras": camera_ranges(),
        "parameters": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in pipeline.parts().items()
        },
    }
    data = build_dataset(settings.n_images, pipeline.tokenizer, args.device, args.seed)
    if data.images.is_cuda:
        torch.cuda.synchronize()
    log["render_seconds"] = round(time.perf_counter() - started, 1)
    print(f"[data] {len(data)} images, {log['render_seconds']} s", flush=True)

    def snapshot(states: dict[str, dict[str, torch.Tensor]]) -> None:
        for part, state in states.items():
            half = {k: v.to("cpu", torch.float16).contiguous() for k, v in state.items()}
            path = out / (f"{part}.safetensors" if args.flat else WEIGHT_FILES[part])
            save_file(half, path, metadata={"format": "pt"})

    phases = (
        ("vae", args.vae_seconds, train_vae),
        ("scorer", args.scorer_seconds, train_scorer),
        ("unet", args.unet_seconds, train_unet),
    )
    for name, seconds, phase in phases:
        if args.total_seconds:
            left = args.total_seconds - RESERVE_S - (time.perf_counter() - started)
            seconds = min(seconds, left)
        if seconds <= 0:
            continue
        if phase is train_unet:
            log[name] = train_unet(pipeline, data, seconds, settings, snapshot)
        else:
            log[name] = phase(pipeline, data, seconds, settings)
        print(f"[{name}] { ({k: v for k, v in log[name].items() if k != 'log'}) }", flush=True)
        save_weights(pipeline, out, flat=args.flat)
    sample_grid(
        pipeline, out / GRID_NAME, n_steps=2 if args.smoke else 50, n_captions=2 * args.smoke
    )
    log["total_seconds"] = round(time.perf_counter() - started, 1)
    log["earlier_runs"] = _earlier_runs(args.resume)
    (out / LOG_NAME).write_text(json.dumps(log, indent=1) + "\n")
    if not args.flat:
        write_card(out, log)
    print(f"[done] {log['total_seconds']} s -> {out}", flush=True)
    return log


def _earlier_runs(resume: str | None) -> list[dict[str, Any]]:
    """The logs of the runs that led to the resumed weights, oldest first."""
    path = Path(resume) / LOG_NAME if resume else None
    if path is None or not path.is_file():
        return []
    log = json.loads(path.read_text())
    return [*log.pop("earlier_runs", []), log]


def pack(flat: str, out: str) -> None:
    """Writes the pipeline folder `out` from the flat folder `flat`."""
    pipeline = new_pipeline(out)
    loaded = load_weights(pipeline, flat)
    if len(loaded) != len(pipeline.parts()):
        raise SDIFastError(f"pack: expected four weight files in {flat!r}, got {loaded}")
    save_weights(pipeline, out)
    for name in (LOG_NAME, GRID_NAME):
        if (Path(flat) / name).is_file():
            shutil.copy(Path(flat) / name, Path(out) / name)
    log_path = Path(out) / LOG_NAME
    if log_path.is_file():
        write_card(Path(out), json.loads(log_path.read_text()))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.pack:
            pack(args.pack, args.out)
        else:
            train(args)
    except SDIFastError as error:
        print(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
