"""The training set: rendered on the device, kept there as bytes.

Four fifths show one object, one fifth two. Cameras are those of the text-to-3D runs
(config.toyworld_config, methods.md D), plus a few overhead ones, so that the word exists. A
caption tells kind, colour and the view by the rule of methods.md C4, from the unperturbed angles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..camera import sample_cameras
from ..config import toyworld_config
from ..constants import (
    BACK_AZIMUTH_DEG,
    FRONT_AZIMUTH_DEG,
    OVERHEAD_ELEVATION_DEG,
    VIEW_NAMES,
)
from .models import IMAGE_SIZE
from .renderer import random_appearance, render_shape
from .scenes import COLOURS, KINDS, Scene, shape_of
from .tokenizer import token_ids

PAIR_SHARE = 0.2
OVERHEAD_SHARE = 0.05
OVERHEAD_RANGE = (60.0, 85.0)  # degrees
RENDER_BATCH = 512  # images that share a shape
PAIR_BATCH = 128  # smaller, so that more pairs of kinds are seen
NO_VIEW = len(VIEW_NAMES)


@dataclass
class Dataset:
    """N captioned images."""

    images: Tensor  # [N, 64, 64, 3] u8
    objects: Tensor  # [N] i64, which objects: row of `scenes`
    views: Tensor  # [N] i64, index into VIEW_NAMES
    scenes: list[Scene]
    tokens: Tensor  # [len(scenes), 5, L] i64: caption with each view's suffix, and without

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def batch_images(self, index: Tensor) -> Tensor:
        """[B, 3, 64, 64] f32 in [0, 1], channels last."""
        return self.images[index].permute(0, 3, 1, 2).float() / 255.0


def camera_ranges() -> dict[str, Any]:
    """What the training set's cameras are drawn from, for the log."""
    camera = toyworld_config().camera
    names = ("elevation_range", "distance_range", "fovy_range", "camera_perturb", "center_perturb")
    return {name: getattr(camera, name) for name in names}


def view_index(azimuth_deg: Tensor, elevation_deg: Tensor) -> Tensor:
    """Index into VIEW_NAMES, [B] i64, of angles [B] in degrees (methods.md C4)."""
    names = ("side", "front", "back", "overhead")
    side, front, back, overhead = (VIEW_NAMES.index(name) for name in names)
    view = torch.full_like(azimuth_deg, side, dtype=torch.int64)
    view = torch.where(azimuth_deg.abs() < FRONT_AZIMUTH_DEG, front, view)
    view = torch.where(azimuth_deg.abs() > BACK_AZIMUTH_DEG, back, view)
    return torch.where(elevation_deg > OVERHEAD_ELEVATION_DEG, overhead, view)


def caption_variants(scene: Scene) -> list[str]:
    """The caption with each view's suffix, in the order of VIEW_NAMES, and without any."""
    return [f"{scene.caption}, {view} view" for view in VIEW_NAMES] + [scene.caption]


def _plan(n_images: int, generator: torch.Generator) -> list[tuple[tuple[str, ...], int, bool]]:
    """(kinds, number of images, overhead?) of every render batch."""
    n_pairs = int(n_images * PAIR_SHARE)
    n_single = n_images - n_pairs
    plan: list[tuple[tuple[str, ...], int, bool]] = []
    for i, kind in enumerate(KINDS):
        count = n_single // len(KINDS) + (i < n_single % len(KINDS))
        above = int(round(count * OVERHEAD_SHARE))
        for total, overhead in ((count - above, False), (above, True)):
            for start in range(0, total, RENDER_BATCH):
                plan.append(((kind,), min(RENDER_BATCH, total - start), overhead))
    for i, start in enumerate(range(0, n_pairs, PAIR_BATCH)):
        a, b = torch.randint(len(KINDS), (2,), generator=generator).tolist()
        overhead = i % round(1 / OVERHEAD_SHARE) == 0
        plan.append(((KINDS[a], KINDS[b]), min(PAIR_BATCH, n_pairs - start), overhead))
    return plan


def build_dataset(
    n_images: int, tokenizer: Any, device: torch.device | str, seed: int = 0
) -> Dataset:
    """Renders `n_images` images on `device`."""
    cpu = torch.Generator().manual_seed(seed)
    gen = torch.Generator(device).manual_seed(seed)
    base = replace(toyworld_config().camera, height=IMAGE_SIZE, width=IMAGE_SIZE)
    colours = torch.tensor(list(COLOURS.values()), device=device)
    names = list(COLOURS)
    size = (n_images, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = torch.empty(size, dtype=torch.uint8, device=device)
    views = torch.empty(n_images, dtype=torch.int64, device=device)
    row_of: dict[Scene, int] = {}
    rows: list[int] = []
    done = 0
    for kinds, count, overhead in _plan(n_images, cpu):
        config = replace(base, batch_size=count)
        if overhead:
            config = replace(config, elevation_range=OVERHEAD_RANGE)
        camera = sample_cameras(config, cpu, device)
        chosen = torch.randint(len(names), (count, len(kinds)), generator=cpu)
        appearance = random_appearance(colours[chosen.to(device)], gen)
        rgb, _ = render_shape(shape_of(kinds), camera, appearance)
        part = slice(done, done + count)
        images[part] = (rgb * 255.0).round().to(torch.uint8)
        views[part] = view_index(camera.azimuth_deg, camera.elevation_deg).to(device)
        for picks in chosen.tolist():
            scene = Scene(tuple((k, names[c]) for k, c in zip(kinds, picks, strict=True)))
            rows.append(row_of.setdefault(scene, len(row_of)))
        done += count
    scenes = list(row_of)
    texts = [text for scene in scenes for text in caption_variants(scene)]
    tokens = token_ids(tokenizer, texts).reshape(len(scenes), NO_VIEW + 1, -1).to(device)
    # Rendered kind by kind; shuffled so that the held-out tail is like the rest.
    order = torch.randperm(n_images, generator=cpu).to(device)
    objects = torch.tensor(rows, device=device)
    return Dataset(images[order], objects[order], views[order], scenes, tokens)
