"""Plain DDIM samples from the pipeline, as a labelled grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .models import IMAGE_SIZE, LATENT_SIZE, ToyPipeline, build_scheduler
from .tokenizer import token_ids

GRID_CAPTIONS = (
    "a red mushroom",
    "a blue house",
    "a green car",
    "a yellow duck",
    "a purple robot",
    "an orange fish",
    "a pink rabbit",
    "a white teapot",
    "a brown chair",
    "a green cactus",
    "a blue penguin",
    "a red mushroom next to a blue house",
)
GRID_VIEWS = ("front", "side", "back")
ZOOM, LABEL = 2, 14  # screen pixels an image pixel; label height


@torch.no_grad()
def ddim_samples(
    pipeline: ToyPipeline,
    captions: list[str],
    n_steps: int = 50,
    guidance: float = 5.0,
    seed: int = 0,
) -> Tensor:
    """Images [len(captions), 3, 64, 64] in [0, 1]; `guidance` in the paper's convention."""
    device = next(pipeline.unet.parameters()).device
    scheduler = build_scheduler()
    scheduler.set_timesteps(n_steps)
    ids = token_ids(pipeline.tokenizer, captions + [""] * len(captions)).to(device)
    context = pipeline.text_encoder(ids).last_hidden_state
    shape = (len(captions), 4, LATENT_SIZE, LATENT_SIZE)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for t in scheduler.timesteps:
        both = pipeline.unet(torch.cat([latents, latents]), t, context).sample
        positive, null = both.chunk(2)
        noise = null + guidance * (positive - null)
        latents = scheduler.step(noise, t, latents).prev_sample
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return (images * 0.5 + 0.5).clamp(0.0, 1.0)


def label_grid(images: Tensor, labels: list[str], columns: int, path: str | Path) -> None:
    """Writes `images` [N, 3, H, W] in [0, 1] as a PNG of labelled tiles."""
    from PIL import Image, ImageDraw

    rows = -(-len(labels) // columns)
    tile_w, tile_h = IMAGE_SIZE * ZOOM + 4, IMAGE_SIZE * ZOOM + LABEL + 2
    sheet = Image.new("RGB", (columns * tile_w, rows * tile_h), "white")
    draw = ImageDraw.Draw(sheet)
    arrays = (images.permute(0, 2, 3, 1).cpu().float().numpy() * 255).round().astype(np.uint8)
    for i, (array, label) in enumerate(zip(arrays, labels, strict=True)):
        x, y = (i % columns) * tile_w, (i // columns) * tile_h
        tile = Image.fromarray(array).resize((IMAGE_SIZE * ZOOM,) * 2, Image.Resampling.NEAREST)
        draw.text((x + 1, y + 1), label[:24], fill="black")
        sheet.paste(tile, (x, y + LABEL))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def sample_grid(
    pipeline: ToyPipeline, path: str | Path, n_steps: int = 50, n_captions: int = 0
) -> None:
    """Front, side and back of GRID_CAPTIONS, into one PNG."""
    captions = GRID_CAPTIONS[: n_captions or len(GRID_CAPTIONS)]
    prompts = [f"{caption}, {view} view" for caption in captions for view in GRID_VIEWS]
    images = ddim_samples(pipeline, prompts, n_steps)
    short = [p.replace(" next to a ", "+").replace(" view", "") for p in prompts]
    label_grid(images, short, columns=2 * len(GRID_VIEWS), path=path)
