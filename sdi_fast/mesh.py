"""A density field as a coloured triangle mesh: marching cubes, then GLB, PLY or OBJ.

Frames: meshes are made in the world frame (z up, the front looks along +x). PLY and OBJ keep it.
glTF wants y up and the front along +z, so for GLB (x, y, z) becomes (y, z, x), a rotation.
Colours: albedo is sRGB, as the images are. PLY and OBJ keep it; glTF's COLOR_0 is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .files import atomic_path
from .types import SDIFastError

if TYPE_CHECKING:
    import trimesh

MESH_FORMATS = ("glb", "ply", "obj")
COARSE_RESOLUTION = 64  # cells a side of the pass that finds the box to mesh
BOX_MARGIN = 2  # coarse cells kept around what that pass found
BOX_FRACTION = 0.1  # of the level: density below it is outside of the box
MAX_LEVEL = 0.5  # of the largest density: closer to it only specks are left
MIN_DENSITY = 0.1  # 1/scene unit: a ray through one unit of it is 90% clear; nothing to mesh
MAX_RESOLUTION = 1024  # cells a side: 4 GB of densities
CHUNK = 1 << 17  # points a call


class Volume(Protocol):
    """What can be meshed: an Engine, or a field read from a file."""

    def density(self, x: Tensor) -> Tensor:
        """Density [M] in 1/scene unit at world points x [M, 3]."""

    def albedo(self, x: Tensor) -> Tensor:
        """sRGB albedo [M, 3] in [0, 1] at world points x [M, 3]."""


@dataclass(frozen=True)
class Surface:
    """A mesh in the world frame, faces wound so that normals point outwards."""

    vertices: np.ndarray  # [V, 3] f64, scene units
    faces: np.ndarray  # [F, 3] i64
    colors: np.ndarray  # [V, 3] f32, sRGB in [0, 1]
    level: float  # density of the level set that was taken, 1/scene unit


def extract_surface(volume: Volume, *, radius: float, resolution: int, threshold: float) -> Surface:
    """The level set of the density inside [-radius, radius]^3.

    A coarse pass finds the box of what is dense; that box gets `resolution` cells along its
    longest side. What touches the bounding cube's faces is closed there.

    Args:
        radius: half side of the bounding cube, scene units.
        resolution: cells along the longest side.
        threshold: density of the surface, 1/scene unit; lowered to half of the field's largest
            density where it is above that (`Surface.level` says which was taken).

    Raises:
        SDIFastError: when there is no surface: the density is nowhere above MIN_DENSITY, or it is
            not finite.
    """
    if not 2 <= resolution <= MAX_RESOLUTION:
        raise SDIFastError(f"resolution: expected 2 to {MAX_RESOLUTION}, got {resolution}")
    if not 0 < threshold < float("inf"):
        raise SDIFastError(f"threshold: expected a density above 0, got {threshold}")
    low, high = _dense_box(volume, radius, threshold)
    spacing = float((high - low).max()) / resolution  # scene units
    cells = np.maximum(np.ceil((high - low) / spacing - 1e-6).astype(int), 1)
    axes = [low[i] + spacing * np.arange(cells[i] + 1) for i in range(3)]
    density = _sample(volume, axes)
    level = _choose_level(density, threshold)

    from skimage.measure import marching_cubes

    closed = np.pad(density, 1)  # zeros around it: whatever reaches the border is closed
    points, faces, _, _ = marching_cubes(closed, level, allow_degenerate=False)
    vertices = np.clip(low + spacing * (points.astype(np.float64) - 1.0), -radius, radius)
    faces = faces.astype(np.int64)
    if _signed_volume(vertices, faces) < 0:
        faces = faces[:, ::-1]
    return Surface(vertices, np.ascontiguousarray(faces), _colors(volume, vertices), level)


def write_mesh(surface: Surface, path: Path) -> None:
    """Writes GLB, PLY or OBJ by the path's suffix, atomically.

    Raises:
        SDIFastError: for another suffix.
    """
    kind = path.suffix[1:].lower()
    if kind not in MESH_FORMATS:
        raise SDIFastError(f"format: expected one of {', '.join(MESH_FORMATS)}, got {kind!r}")
    if kind == "glb":
        mesh = _trimesh(surface.vertices[:, [1, 2, 0]], surface.faces, _linear(surface.colors))
        data: Any = mesh.export(
            file_type="glb", include_normals=True, tree_postprocessor=_matte_material
        )
    else:
        mesh = _trimesh(surface.vertices, surface.faces, surface.colors)
        data = mesh.export(file_type=kind)
    with atomic_path(path) as temp:
        temp.write_bytes(data.encode() if isinstance(data, str) else data)


def _dense_box(volume: Volume, radius: float, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners [3] of the part of the cube worth meshing, by a coarse pass."""
    axis = np.linspace(-radius, radius, COARSE_RESOLUTION + 1)
    density = _sample(volume, [axis, axis, axis])
    level = _choose_level(density, threshold)
    dense = np.argwhere(density > BOX_FRACTION * level)
    margin = BOX_MARGIN * (axis[1] - axis[0])
    low = np.maximum(axis[dense.min(0)] - margin, -radius)
    return low, np.minimum(axis[dense.max(0)] + margin, radius)


def _choose_level(density: np.ndarray, threshold: float) -> float:
    """`threshold`, but at most MAX_LEVEL of the largest density."""
    largest = float(density.max())
    if not np.isfinite(density).all():
        bad = int((~np.isfinite(density)).sum())
        raise SDIFastError(f"mesh: the density is not finite at {bad} of {density.size} points")
    if largest < MIN_DENSITY:
        raise SDIFastError(
            f"mesh: no surface: the volume is empty (its density is at most {largest:.3g} "
            "per scene unit)"
        )
    return min(threshold, MAX_LEVEL * largest)


def _sample(volume: Volume, axes: list[np.ndarray]) -> np.ndarray:  # [X, Y, Z] f32
    """Density at the grid's points; slabs along x, so that memory stays bounded."""
    y, z = (torch.from_numpy(a).float() for a in axes[1:])
    plane = torch.cartesian_prod(y, z)  # [Y * Z, 2]
    out = np.empty([len(a) for a in axes], np.float32)
    per_call = max(CHUNK // len(plane), 1)
    for start in range(0, len(axes[0]), per_call):
        x = torch.from_numpy(axes[0][start : start + per_call]).float()
        points = torch.cat(
            [x.repeat_interleave(len(plane))[:, None], plane.repeat(len(x), 1)], dim=1
        )
        values = torch.cat([volume.density(p).detach().float().cpu() for p in points.split(CHUNK)])
        out[start : start + len(x)] = values.reshape(len(x), len(y), len(z)).numpy()
    return out


def _colors(volume: Volume, vertices: np.ndarray) -> np.ndarray:  # [V, 3] f32
    points = torch.from_numpy(vertices).float()
    parts = [volume.albedo(p).detach().float().cpu() for p in points.split(CHUNK)]
    return torch.cat(parts).clamp(0.0, 1.0).numpy()


def _signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Volume enclosed; positive when the faces are wound outwards."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6.0)


def _linear(srgb: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1's decoding."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _trimesh(vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray) -> trimesh.Trimesh:
    import trimesh

    return trimesh.Trimesh(
        vertices,
        faces,
        vertex_colors=np.round(colors * 255.0).astype(np.uint8),
        process=False,
    )


def _matte_material(tree: dict[str, Any]) -> None:
    """Adds a material: without one glTF means metal, which is black where nothing reflects."""
    pbr = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    tree["materials"] = [{"name": "matte", "pbrMetallicRoughness": pbr}]
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive["material"] = 0
