"""How near a run came to its caption: silhouettes against the ground truth, and the caption's rank.

The eight held-out views lie between those that are usually looked at: azimuth 22.5 + 45 i degrees,
elevation 15, distance 1.75, fovy 55 (the middle of the training ranges), nothing perturbed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..camera import orbit_cameras
from ..config import CameraConfig
from ..types import Camera, SDIFastError
from .renderer import render_scene
from .scenes import COLOURS, KINDS, Scene, parse_caption, strip_view
from .score import IMAGE_PIXELS, Scorer

if TYPE_CHECKING:
    from ..engine import Engine

EVAL_PROMPTS = (
    "a red mushroom",
    "a blue house",
    "a green car",
    "a yellow duck",
    "a purple robot",
    "an orange fish",
    "a pink rabbit",
    "a white teapot",
    "a brown chair",
    "a blue penguin",
)
N_VIEWS = 8
ELEVATION_DEG, DISTANCE, FOVY_DEG = 15.0, 1.75, 55.0  # degrees, scene units, degrees
SILHOUETTE_PIXELS = 128
N_SAME_KIND, N_SAME_COLOUR, N_OTHERS = 7, 7, 5  # distractors
N_CANDIDATES = 1 + N_SAME_KIND + N_SAME_COLOUR + N_OTHERS

RenderFn = Callable[[Camera], tuple[Tensor, Tensor]]  # rgb [B, H, W, 3], opacity [B, H, W]


def held_out_cameras(
    height: int = SILHOUETTE_PIXELS, width: int = SILHOUETTE_PIXELS, device: Any = "cpu"
) -> Camera:
    """The N_VIEWS held-out cameras."""
    return orbit_cameras(
        CameraConfig(),
        N_VIEWS,
        height=height,
        width=width,
        elevation_deg=ELEVATION_DEG,
        distance=DISTANCE,
        fovy_deg=FOVY_DEG,
        azimuth_offset_deg=180.0 / N_VIEWS,
        device=device,
    )


def candidates(caption: str) -> list[str]:
    """N_CANDIDATES captions to choose from: that of `caption`'s scene first, then distractors.

    They have the kind in other colours, the colour on other kinds, or neither. The same captions
    every time: the choice is seeded by the caption.

    Raises:
        SDIFastError: for a caption of anything but one object.
    """
    scene = parse_caption(caption)
    if len(scene.objects) != 1:
        raise SDIFastError(f"caption: expected one object, got {len(scene.objects)} in {caption!r}")
    kind, colour = scene.objects[0]
    rng = random.Random(zlib.crc32(scene.caption.encode()))
    colours = [c for c in COLOURS if c != colour]
    kinds = [k for k in KINDS if k != kind]
    others = [(k, c) for k in kinds for c in colours]
    chosen = [(kind, colour)]
    chosen += [(kind, c) for c in rng.sample(colours, N_SAME_KIND)]
    chosen += [(k, colour) for k in rng.sample(kinds, N_SAME_COLOUR)]
    chosen += rng.sample(others, N_OTHERS)
    return [Scene((pair,)).caption for pair in chosen]


def silhouette_iou(
    opacity: Tensor,  # [B, H, W], in [0, 1]
    scene: Scene,
    cameras: Camera,  # B views of H x W pixels
    threshold: float = 0.5,
) -> Tensor:  # [B]
    """Intersection over union of each view's silhouette with the ground truth's.

    A pixel belongs to a silhouette where its opacity, or the part of it that the ground truth
    covers, is above `threshold`.

    Raises:
        SDIFastError: for an opacity of another shape than the cameras'.
    """
    expected = (cameras.batch_size, cameras.height, cameras.width)
    if tuple(opacity.shape) != expected:
        raise SDIFastError(f"opacity: expected {list(expected)}, got {list(opacity.shape)}")
    _, mask = render_scene(scene, cameras)
    truth, got = mask > threshold, (opacity > threshold).to(mask.device)
    both = (truth & got).flatten(1).sum(1)
    either = (truth | got).flatten(1).sum(1)
    return both / either.clamp_min(1)  # the ground truth is never empty


def evaluate_engine(engine: Engine, caption: str) -> dict[str, Any]:
    """`evaluate_run` of what `engine` renders as it stands."""

    def render(camera: Camera) -> tuple[Tensor, Tensor]:
        output = engine.render(camera)
        return output.comp_rgb, output.opacity[..., 0]

    return evaluate_run(render, caption, device=engine.device)


@torch.no_grad()
def evaluate_run(
    render_fn: RenderFn, caption: str, *, scorer: Scorer | None = None, device: Any = "cpu"
) -> dict[str, Any]:
    """Measures of one run's renders of the held-out views, as plain numbers.

    Args:
        render_fn: gives a camera's composited rgb and opacity; called at 128 and at 64 pixels.
        caption: of one object, a view suffix is ignored.
        scorer: default the bundled one.
        device: where the cameras given to `render_fn` lie.

    Returns:
        iou (mean of iou_views), iou_views, rank (1: the caption comes first among `candidates`,
        by its cosine averaged over the views) and score (100 max(0, cosine) averaged over them).
    """
    caption = strip_view(caption)
    names = candidates(caption)
    scorer = Scorer.load() if scorer is None else scorer
    cameras = held_out_cameras(device=device)
    _, opacity = render_fn(cameras)
    iou = silhouette_iou(opacity, parse_caption(caption), cameras)
    rgb, _ = render_fn(held_out_cameras(IMAGE_PIXELS, IMAGE_PIXELS, device))
    images = rgb.float().permute(0, 3, 1, 2).clamp(0.0, 1.0).cpu()
    cosine = scorer.image_features(images) @ scorer.text_features(names).T  # [B, N_CANDIDATES]
    mean = cosine.mean(0)
    return {
        "iou": float(iou.mean()),
        "iou_views": [float(value) for value in iou],
        "rank": 1 + int((~(mean[1:] < mean[0])).sum()),  # ties and NaNs count against the run
        "score": float(100.0 * cosine[:, 0].clamp_min(0.0).mean()),
    }
