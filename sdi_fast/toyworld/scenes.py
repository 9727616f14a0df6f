"""Captions and the scenes that they mean: one ground truth for each caption.

"a COLOUR KIND" is one object at the origin, facing +x; "a COLOUR KIND next to a COLOUR KIND" is
two, scaled by PAIR_SCALE and moved along y. From the front (camera on +x, looking along -x, z up)
right = look x up = (-1, 0, 0) x (0, 0, 1) = +y, so the first object, at the left, goes to -y.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property, reduce

import numpy as np
import torch
from torch import Tensor

from ..constants import VIEW_NAMES
from ..types import SDIFastError
from .animals import ANIMALS
from .sdf import Solid, placed
from .things import THINGS

PAIR_SCALE = 0.6
PAIR_OFFSET = 0.37  # scene units along y, each side
BOUNDING_RADIUS = 0.7  # scene units; every single object lies inside
MAX_CAPTION_CHARS = 200

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.15, 0.62, 0.20),
    "blue": (0.12, 0.28, 0.85),
    "purple": (0.52, 0.16, 0.72),
    "pink": (0.96, 0.55, 0.75),
    "white": (0.93, 0.93, 0.93),
    "brown": (0.45, 0.26, 0.12),
}
PALETTE: dict[str, tuple[float, float, float]] = {
    "black": (0.06, 0.06, 0.07),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.62, 0.64, 0.68),
    "dark": (0.17, 0.18, 0.20),
    "slate": (0.30, 0.24, 0.28),
    "cream": (0.93, 0.85, 0.68),
    "wood": (0.50, 0.31, 0.16),
    "terracotta": (0.74, 0.38, 0.22),
    "gold": (0.97, 0.80, 0.22),
    "orange": (0.97, 0.55, 0.12),
    "sky": (0.55, 0.82, 0.95),
    "rose": (0.95, 0.50, 0.62),
    "crimson": (0.80, 0.08, 0.12),
    "leaf": (0.30, 0.60, 0.22),
    "teal": (0.10, 0.60, 0.58),
}
_ALL_PARTS = {**ANIMALS, **THINGS}
KINDS: tuple[str, ...] = tuple(sorted(_ALL_PARTS))

_SUFFIX = re.compile(r"\s*,?\s*\b(" + "|".join(VIEW_NAMES) + r") view\s*$")


@dataclass(frozen=True)
class Shape:
    """Geometry without the captions' colours: solids, and where each one's colour comes from."""

    solids: tuple[Solid, ...]
    slots: tuple[int | tuple[float, float, float], ...]  # object index for "main", or fixed rgb
    n_objects: int
    bounding_radius: float  # scene units, about the origin

    def distance(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Signed distance, scene units, of points given by coordinate."""
        return reduce(torch.minimum, [s(x, y, z) for s in self.solids])

    def nearest(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """[N] i64, the part that owns each point: the one of least signed distance."""
        best = self.solids[0](x, y, z)
        index = torch.zeros_like(x, dtype=torch.int64)
        for i, solid in enumerate(self.solids[1:], start=1):
            value = solid(x, y, z)
            index = torch.where(value < best, i, index)
            best = torch.minimum(best, value)
        return index

    def palette(self, main: Tensor) -> Tensor:
        """Colours of the parts, [B, n_parts, 3], from the objects' main colours [B, n, 3]."""
        rows = [
            main[:, slot] if isinstance(slot, int) else main.new_tensor(slot).expand(len(main), 3)
            for slot in self.slots
        ]
        return torch.stack(rows, dim=1)


@cache
def shape_of(kinds: tuple[str, ...]) -> Shape:
    """The shape of one kind, or of two side by side."""
    solids: list[Solid] = []
    slots: list[int | tuple[float, float, float]] = []
    for i, kind in enumerate(kinds):
        for colour, solid in _ALL_PARTS[kind]:
            if len(kinds) > 1:
                offset = -PAIR_OFFSET if i == 0 else PAIR_OFFSET
                solid = placed(solid, (0.0, offset, 0.0), PAIR_SCALE)
            solids.append(solid)
            slots.append(i if colour == "main" else PALETTE[colour])
    pair = PAIR_OFFSET + PAIR_SCALE * BOUNDING_RADIUS
    radius = BOUNDING_RADIUS if len(kinds) == 1 else pair
    return Shape(tuple(solids), tuple(slots), len(kinds), radius)


@dataclass(frozen=True)
class Scene:
    """What a caption means: one or two (kind, colour) objects."""

    objects: tuple[tuple[str, str], ...]

    @property
    def caption(self) -> str:
        names = (f"{article(colour)} {colour} {kind}" for kind, colour in self.objects)
        return " next to ".join(names)

    @cached_property
    def shape(self) -> Shape:
        return shape_of(tuple(kind for kind, _ in self.objects))

    @property
    def bounding_radius(self) -> float:
        """Scene units: the whole scene lies within this of the origin."""
        return self.shape.bounding_radius

    def main_colours(self, device: torch.device | str = "cpu") -> Tensor:
        """[1, n_objects, 3], the captions' colours."""
        return torch.tensor([[COLOURS[colour] for _, colour in self.objects]], device=device)

    def sdf(self, points: Tensor) -> Tensor:
        """Lower bound of the signed distance, [N], of `points` [N, 3]; scene units, < 0 inside."""
        return self.shape.distance(*points.unbind(-1))

    def color(self, points: Tensor) -> Tensor:
        """Albedo in [0, 1], [N, 3], of the part nearest to each of `points` [N, 3]."""
        main = self.main_colours(points.device).to(points.dtype)
        return self.shape.palette(main)[0][self.shape.nearest(*points.unbind(-1))]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def strip_view(text: str) -> str:
    """`text` without a trailing ", front view" (side, back, overhead)."""
    return _SUFFIX.sub("", text.strip().lower())


def parse_caption(text: str) -> Scene:
    """The scene that `text` describes; a view suffix is ignored.

    Raises SDIFastError for anything but "a COLOUR KIND [next to a COLOUR KIND]".
    """
    if len(text) > MAX_CAPTION_CHARS:
        raise SDIFastError(
            f"caption: expected at most {MAX_CAPTION_CHARS} characters, got {len(text)}"
        )
    objects = []
    for phrase in strip_view(text).rstrip(".").split(" next to "):
        words = phrase.split()
        if words and words[0] in ("a", "an", "the"):
            words = words[1:]
        if len(words) != 2 or words[0] not in COLOURS or words[1] not in KINDS:
            raise SDIFastError(
                f'caption: expected "a COLOUR KIND [next to a COLOUR KIND]" with COLOUR in '
                f"{', '.join(COLOURS)} and KIND in {', '.join(KINDS)}, got {text!r}"
            )
        objects.append((words[1], words[0]))
    if len(objects) > 2:
        raise SDIFastError(f"caption: expected one or two objects, got {len(objects)} in {text!r}")
    return Scene(tuple(objects))


def scene_mesh(scene: Scene, resolution: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] (scene units) and faces [F, 3] of the scene's surface, by marching cubes.

    `resolution` counts grid points a side; needs scikit-image.
    """
    from skimage.measure import marching_cubes

    half = scene.bounding_radius + 0.05
    axis = torch.linspace(-half, half, resolution)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    values = scene.shape.distance(x, y, z).numpy()
    vertices, faces, _, _ = marching_cubes(values, 0.0, spacing=(float(axis[1] - axis[0]),) * 3)
    return vertices - half, faces
