"""A procedural world of captioned objects, and the tiny pipeline that is trained on it.

A caption such as "a red mushroom" or "a blue car next to a green cactus" means one scene
(scenes.py), which is also its ground truth: a signed distance function that renderer.py draws
under the cameras of the text-to-3D runs. train.py makes the bundled pipeline from such images
(`python -m sdi_fast.toyworld.train --out DIR`), score.py the CLIP-like scorer beside it, and
evaluate.py measures runs against the ground truth.

    from sdi_fast.toyworld import evaluate_run, parse_caption

Names load on first use, so that importing the package stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import EVAL_PROMPTS as EVAL_PROMPTS
    from .evaluate import candidates as candidates
    from .evaluate import evaluate_run as evaluate_run
    from .evaluate import held_out_cameras as held_out_cameras
    from .evaluate import silhouette_iou as silhouette_iou
    from .models import load_pipeline_folder as load_pipeline_folder
    from .renderer import render_scene as render_scene
    from .scenes import COLOURS as COLOURS
    from .scenes import KINDS as KINDS
    from .scenes import Scene as Scene
    from .scenes import parse_caption as parse_caption
    from .scenes import scene_mesh as scene_mesh
    from .scenes import strip_view as strip_view
    from .score import Scorer as Scorer

_HOMES = {
    "COLOURS": "scenes",
    "EVAL_PROMPTS": "evaluate",
    "KINDS": "scenes",
    "Scene": "scenes",
    "Scorer": "score",
    "candidates": "evaluate",
    "evaluate_run": "evaluate",
    "held_out_cameras": "evaluate",
    "load_pipeline_folder": "models",
    "parse_caption": "scenes",
    "render_scene": "renderer",
    "scene_mesh": "scenes",
    "silhouette_iou": "evaluate",
    "strip_view": "scenes",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
