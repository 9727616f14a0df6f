"""Meshes of a sphere, whose answers are known."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from sdi_fast.export import export_mesh
from sdi_fast.mesh import Surface, extract_surface, write_mesh
from sdi_fast.types import SDIFastError

CENTER = (0.4, -0.3, 0.2)  # not the origin, so that a swapped axis shows
SPHERE_RADIUS = 0.6
PEAK = 50.0  # density inside, 1/scene unit


class Sphere:
    """Density falls from PEAK to 0 across the sphere's surface; the colour says the direction."""

    def __init__(self, peak: float = PEAK, center: tuple[float, ...] = CENTER) -> None:
        self.peak, self.center = peak, torch.tensor(center)
        self.n_most = 0  # points of the largest call

    def density(self, x: Tensor) -> Tensor:
        self.n_most = max(self.n_most, len(x))
        inside = (SPHERE_RADIUS - (x - self.center).norm(dim=-1)) / 0.02
        return self.peak * torch.sigmoid(inside)

    def albedo(self, x: Tensor) -> Tensor:
        return ((x - self.center) / SPHERE_RADIUS + 1.0) / 2.0


def sphere_surface(threshold: float = PEAK / 2, resolution: int = 40, **kwargs: Any) -> Surface:
    return extract_surface(Sphere(**kwargs), radius=2.0, resolution=resolution, threshold=threshold)


def to_trimesh(surface: Surface) -> trimesh.Trimesh:
    return trimesh.Trimesh(surface.vertices, surface.faces, process=False)


def read_glb(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    assert data[:4] == b"glTF"
    return json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])


# ---- the surface ----------------------------------------------------------------------------


def test_the_surface_of_a_sphere() -> None:
    surface = sphere_surface()
    distance = np.linalg.norm(surface.vertices - CENTER, axis=1)
    # linear interpolation along edges of about 2 (0.6 + margin) / 40 = 0.04 under a sigmoid of
    # width 0.02: within a fraction of an edge
    assert np.abs(distance - SPHERE_RADIUS).max() < 0.02
    mesh = to_trimesh(surface)
    assert mesh.is_watertight and mesh.is_winding_consistent
    expected = 4 / 3 * math.pi * SPHERE_RADIUS**3
    assert mesh.volume == pytest.approx(expected, rel=0.02)  # positive: wound outwards
    outward = np.einsum("ij,ij->i", mesh.face_normals, mesh.triangles_center - CENTER)
    assert (outward > 0).all()
    assert surface.level == PEAK / 2


def test_the_level_moves_the_surface() -> None:
    inner, outer = sphere_surface(0.45 * PEAK), sphere_surface(0.1 * PEAK)
    assert to_trimesh(inner).volume < to_trimesh(outer).volume


def test_the_box_is_tight_so_that_resolution_is_spent_on_the_object() -> None:
    surface = sphere_surface(resolution=40)
    mesh = to_trimesh(surface)
    # the box is at most the sphere's 1.2, plus margins of 2 + 1 coarse cells (3 * 0.0625) a side
    assert mesh.edges_unique_length.max() < math.sqrt(3) * (1.2 + 6 * 0.0625) / 40 * 1.01


def test_vertex_colours_are_the_albedo_there() -> None:
    surface = sphere_surface()
    expected = Sphere().albedo(torch.from_numpy(surface.vertices).float()).clamp(0, 1)
    np.testing.assert_allclose(surface.colors, expected.numpy(), atol=1e-6)


def test_density_is_asked_for_in_chunks() -> None:
    sphere = Sphere()
    extract_surface(sphere, radius=2.0, resolution=100, threshold=PEAK / 2)
    assert 0 < sphere.n_most <= 1 << 17


@pytest.mark.parametrize("factor", [10.0, 0.999])
def test_a_level_near_or_above_the_largest_density_is_lowered_to_half(factor: float) -> None:
    surface = sphere_surface(threshold=factor * PEAK)
    assert surface.level == pytest.approx(PEAK / 2, rel=0.01)
    assert to_trimesh(surface).volume == pytest.approx(
        to_trimesh(sphere_surface()).volume, rel=0.02
    )


def test_an_object_cut_by_the_bounding_cube_is_closed() -> None:
    surface = sphere_surface(center=(2.0, 0.0, 0.0))
    assert to_trimesh(surface).is_watertight and np.abs(surface.vertices).max() <= 2.0
    half = 2 / 3 * math.pi * SPHERE_RADIUS**3
    assert to_trimesh(surface).volume == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize("peak", [0.0, 0.05])
def test_an_empty_volume_has_no_surface(peak: float) -> None:
    with pytest.raises(SDIFastError, match="no surface: the volume is empty") as caught:
        sphere_surface(peak=peak)
    assert "\n" not in str(caught.value)


def test_a_density_that_is_not_finite_is_said() -> None:
    with pytest.raises(SDIFastError, match="not finite"):
        sphere_surface(peak=math.nan)


def test_a_solid_cube_is_meshed_at_its_border() -> None:
    class Solid(Sphere):
        def density(self, x: Tensor) -> Tensor:
            return torch.full((len(x),), 30.0)

    surface = extract_surface(Solid(), radius=1.0, resolution=16, threshold=10.0)
    assert to_trimesh(surface).is_watertight
    assert to_trimesh(surface).volume == pytest.approx(8.0, rel=0.05)


@pytest.mark.parametrize(
    ("name", "value"),
    [("resolution", 1), ("resolution", 5000), ("threshold", 0.0), ("threshold", math.nan)],
)
def test_bad_mesh_settings(name: str, value: float) -> None:
    with pytest.raises(SDIFastError, match=f"^{name}: "):
        sphere_surface(**{name: value})


# ---- mesh files -----------------------------------------------------------------------------


def test_glb_is_y_up_front_along_z_matte_and_linear(tmp_path: Path) -> None:
    surface = sphere_surface()
    write_mesh(surface, tmp_path / "mesh.glb")
    mesh = trimesh.load(tmp_path / "mesh.glb", force="mesh", skip_materials=True)
    x, y, z = CENTER
    np.testing.assert_allclose(mesh.bounds.mean(axis=0), (y, z, x), atol=0.02)
    assert mesh.volume == pytest.approx(to_trimesh(surface).volume, rel=1e-4)  # not mirrored
    tree = read_glb(tmp_path / "mesh.glb")
    primitive = tree["meshes"][0]["primitives"][0]
    assert {"POSITION", "NORMAL", "COLOR_0"} <= primitive["attributes"].keys()
    material = tree["materials"][primitive["material"]]["pbrMetallicRoughness"]
    assert material["metallicFactor"] == 0.0
    stored = np.asarray(mesh.visual.vertex_colors)[:, :3] / 255.0
    linear = np.where(
        surface.colors <= 0.04045, surface.colors / 12.92, ((surface.colors + 0.055) / 1.055) ** 2.4
    )
    np.testing.assert_allclose(stored, linear, atol=0.5 / 255 + 1e-6)  # rounding to 8 bits
    outward = np.einsum("ij,ij->i", mesh.vertex_normals, mesh.vertices - np.array([y, z, x]))
    assert (outward > 0).all()


@pytest.mark.parametrize("kind", ["ply", "obj"])
def test_ply_and_obj_keep_the_world_frame_and_srgb(tmp_path: Path, kind: str) -> None:
    surface = sphere_surface()
    write_mesh(surface, tmp_path / f"mesh.{kind}")
    mesh = trimesh.load(tmp_path / f"mesh.{kind}", force="mesh", process=False)
    np.testing.assert_allclose(mesh.vertices, surface.vertices, atol=1e-5)
    colors = np.asarray(mesh.visual.vertex_colors)[:, :3] / 255.0
    np.testing.assert_allclose(colors, surface.colors, atol=1 / 255)
    assert [p.name for p in tmp_path.iterdir()] == [f"mesh.{kind}"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SDIFastError, match="^format: "):
        export_mesh(Sphere(), tmp_path / "m.stl", radius=2.0, resolution=8, threshold=1.0)
    assert not list(tmp_path.iterdir())
