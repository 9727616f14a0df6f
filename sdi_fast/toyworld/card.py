"""Writes the model card from the log of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .dataset import OVERHEAD_SHARE, PAIR_SHARE
from .scenes import COLOURS, KINDS

RETRAIN = (
    "python -m sdi_fast.toyworld.train --out DIR "
    "--vae-seconds {vae:.0f} --unet-seconds {unet:.0f} --scorer-seconds {scorer:.0f}"
)


def _all_runs(log: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that led to the weights, oldest first, `log`'s own last."""
    return [*log.get("earlier_runs", []), log]


def _phase(log: dict[str, Any], name: str) -> dict[str, Any]:
    """All runs' entries of a phase summed: seconds and steps; measures of the last."""
    entries = [run[name] for run in _all_runs(log) if name in run]
    total = dict(entries[-1]) if entries else {"seconds": 0.0, "steps": 0}
    for key in ("seconds", "steps"):
        total[key] = sum(entry[key] for entry in entries)
    return total


def _run_line(number: int, run: dict[str, Any]) -> str:
    """What one run trained, on what, and which cameras its images were seen from."""
    parts = ", ".join(
        f"{name} ({run[name]['steps']} steps, {run[name]['seconds']:.0f} s)"
        for name in ("vae", "scorer", "unet")
        if name in run
    )
    cameras = run.get("cameras")
    if cameras is None:  # logged before runs had ranges of their own
        seen = "the official camera ranges (methods.md D)"
    else:
        low, high = cameras["distance_range"]
        narrow, wide = cameras["fovy_range"]
        seen = (
            f"distance {low} to {high}, fovy {narrow:.0f} to {wide:.0f} degrees, position within "
            f"{cameras['camera_perturb']}, look-at point spread by {cameras['center_perturb']}"
        )
    dtype = "bfloat16" if run["settings"]["low_precision"] else "float32"
    return (
        f"{number}. {parts}: {run['settings']['n_images']} images seen from {seen}; "
        f"{run['device']}, {dtype}, torch {run['torch']}, seed {run['seed']}.\n"
    )


def write_card(folder: Path, log: dict[str, Any]) -> None:
    """README.md of the pipeline folder."""
    vae, unet, scorer = (_phase(log, name) for name in ("vae", "unet", "scorer"))
    count = {name: f"{n / 1e6:.2f} M" for name, n in log["parameters"].items()}
    losses = ", ".join(f"t={t}: {v:.4f}" for t, v in unet.get("loss_holdout", {}).items())
    files = sorted(p for p in folder.rglob("*.safetensors"))
    size = sum(p.stat().st_size for p in files) / 1e6
    settings = log["settings"]
    psnr, top1 = vae.get("psnr_holdout_db", 0.0), scorer.get("top1_holdout", 0.0)

    def row(title: str, name: str, phase: dict[str, Any], measure: str) -> str:
        seconds = f"{phase['seconds']:.0f}"
        return f"| {title} | {count[name]} | {phase['steps']} | {seconds} | {measure} |"

    noted = [run["note"] for run in _all_runs(log) if "note" in run]
    notes = "".join(f"Counted in the seconds only: {note}.\n" for note in noted)
    whole_runs = [run for run in _all_runs(log) if "settings" in run]
    runs = "".join(_run_line(i + 1, run) for i, run in enumerate(whole_runs))
    command = RETRAIN.format(vae=vae["seconds"], unet=unet["seconds"], scorer=scorer["seconds"])
    text = f"""# toyworld: a tiny text-to-image pipeline

A Stable Diffusion folder (64 x 64 images, 16 x 16 x 4 latents, epsilon prediction, DDIM) that
knows a procedural world of {len(KINDS)} kinds of objects in {len(COLOURS)} colours. It exists
so that text-to-3D runs on a CPU, out of the box and with exact ground truth. It knows nothing else.

- Prompts: "a COLOUR KIND", "a COLOUR KIND next to a COLOUR KIND"; suffixes ", front view",
  ", side view", ", back view", ", overhead view".
- Kinds: {", ".join(KINDS)}.
- Colours: {", ".join(COLOURS)}.

## Data
Images rendered by sphere tracing from signed distance functions (sdi_fast/toyworld),
{PAIR_SHARE:.0%} with two objects, {OVERHEAD_SHARE:.0%} seen from overhead; cameras as below,
perturbed as in text-to-3D runs; half nearly flat albedo, half lit by a point light; plain or smooth
random backgrounds. {settings["n_holdout"]} images of a run are held out. No other data was used.

## Training
AdamW, cosine to 0, moving average. A later run goes on from the weights of the one before it:

{runs}
In all:

| part | parameters | steps | seconds | held-out measure |
|---|---|---|---|---|
{row("AutoencoderKL", "vae", vae, f"PSNR {psnr:.1f} dB")}
{row("UNet2DConditionModel", "unet", unet, f"epsilon MSE {losses}")}
| CLIPTextModel | {count["text_encoder"]} | with the UNet | | |
{row("scorer", "scorer", scorer, f"top-1 {top1:.3f}")}

{notes}The loss at every step logged stands in train_log.json. Weights: fp16, {size:.1f} MB in all.

## Samples
Plain DDIM, 50 steps, guidance 5 (paper's convention), seed 0:

![samples](samples.png)

## Retrain

    {command}

## Limits
Two-object scenes are the weakest. Objects always face +x and have one fixed shape.
"""
    (folder / "README.md").write_text(text)
