"""toyworld's scenes, renderer and captions: what the trained model and the scores rest on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

import sdi_fast.toyworld as toyworld
from sdi_fast.camera import orbit_cameras, sample_cameras
from sdi_fast.config import CameraConfig
from sdi_fast.reference.rays import generate_rays
from sdi_fast.toyworld.renderer import (
    Appearance,
    flat_background,
    pixel_rays,
    render_scene,
    render_shape,
)
from sdi_fast.toyworld.scenes import (
    BOUNDING_RADIUS,
    COLOURS,
    KINDS,
    Scene,
    Shape,
    parse_caption,
    scene_mesh,
    shape_of,
    strip_view,
)
from sdi_fast.toyworld.sdf import sphere
from sdi_fast.types import Camera, SDIFastError

PAIRS = (("mushroom", "house"), ("fish", "cake"))
SHAPES = [(kind,) for kind in KINDS] + list(PAIRS)

# A point inside and one outside of each kind, the latter where only the right parts leave a hole:
# the mug's opening, the gap under the chair, the cake's missing slice, the teapot's handle.
LANDMARKS = {
    "boat": ((0.0, 0.0, -0.2), (0.35, 0.0, 0.2)),
    "cactus": ((0.0, 0.0, 0.0), (0.0, 0.41, -0.35)),
    "cake": ((0.2, 0.0, -0.2), (-0.4, 0.0, -0.2)),
    "car": ((0.0, 0.0, -0.1), (0.45, 0.0, 0.25)),
    "chair": ((0.0, 0.0, -0.08), (0.0, 0.0, -0.4)),
    "duck": ((0.0, 0.0, -0.2), (-0.3, 0.0, 0.4)),
    "fish": ((0.1, 0.0, 0.0), (-0.6, 0.0, 0.0)),
    "house": ((0.0, 0.0, -0.2), (0.0, 0.45, 0.3)),
    "lamp": ((0.0, 0.0, 0.2), (0.3, 0.0, -0.2)),
    "mug": ((0.1, 0.0, -0.3), (0.1, 0.0, 0.38)),
    "mushroom": ((0.0, 0.0, 0.2), (0.45, 0.0, -0.4)),
    "penguin": ((0.0, 0.0, -0.1), (0.45, 0.0, -0.1)),
    "rabbit": ((0.0, 0.0, -0.26), (0.0, 0.0, 0.5)),
    "robot": ((0.0, 0.0, -0.1), (0.03, 0.0, -0.45)),
    "rocket": ((0.0, 0.0, 0.0), (0.3, 0.0, 0.3)),
    "snowman": ((0.0, 0.0, -0.3), (0.35, 0.0, 0.1)),
    "teapot": ((0.0, 0.0, -0.1), (-0.43, 0.0, -0.04)),
}


def orbit(n_views: int, size: int, elevation: float = 15.0) -> Camera:
    config = CameraConfig(height=size, width=size)
    return orbit_cameras(config, n_views, elevation_deg=elevation, distance=1.75, fovy_deg=55.0)


def distances(shape: Shape, points: Tensor) -> Tensor:
    return shape.distance(*points.unbind(-1))


# ---- distances ----------------------------------------------------------------------------


def test_the_world_is_as_large_as_promised() -> None:
    assert len(KINDS) >= 12 and len(COLOURS) >= 8
    assert all(len(shape_of((kind,)).solids) >= 4 for kind in KINDS), "several parts each"
    assert set(LANDMARKS) == set(KINDS)
    rgb = torch.tensor(list(COLOURS.values()))
    apart = torch.cdist(rgb, rgb) + torch.eye(len(rgb)) * 9.0
    assert apart.min() > 0.2, "two colours look alike"


@pytest.mark.parametrize("kinds", SHAPES, ids="+".join)
def test_distances_never_overstep(kinds: tuple[str, ...]) -> None:
    """|f(p) - f(q)| <= |p - q|, near and far: sphere tracing steps through no surface."""
    shape = shape_of(kinds)
    gen = torch.Generator().manual_seed(1)
    p = (torch.rand(20_000, 3, generator=gen, dtype=torch.float64) - 0.5) * 2.4
    direction = torch.nn.functional.normalize(
        torch.randn(p.shape, generator=gen, dtype=torch.float64), dim=-1
    )
    length = 10.0 ** (-4.0 * torch.rand(len(p), 1, generator=gen, dtype=torch.float64))
    q = p + direction * length  # 1e-4 to 1 scene units away
    slope = (distances(shape, p) - distances(shape, q)).abs() / length[:, 0]
    assert slope.max() <= 1.0 + 1e-9  # f64: the quotient's rounding is about 1e-12
    # and it is no mere constant: somewhere the bound is met
    assert slope.max() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_negative_inside_only(kind: str) -> None:
    inside, outside = distances(shape_of((kind,)), torch.tensor(LANDMARKS[kind]))
    assert inside < -0.02 and outside > 0.005


@pytest.mark.parametrize("kinds", SHAPES, ids="+".join)
def test_scenes_lie_inside_their_bounding_sphere(kinds: tuple[str, ...]) -> None:
    shape = shape_of(kinds)
    if len(kinds) == 1:
        assert shape.bounding_radius == BOUNDING_RADIUS
    gen = torch.Generator().manual_seed(2)
    p = torch.nn.functional.normalize(torch.randn(20_000, 3, generator=gen), dim=-1)
    radius = shape.bounding_radius * (1.0 + 0.5 * torch.rand(len(p), 1, generator=gen))
    assert distances(shape, p * radius).min() > 0
    assert distances(shape, p * shape.bounding_radius * 0.9).min() < 0.15, "needlessly large sphere"


# ---- pictures -----------------------------------------------------------------------------


def test_rays_are_those_of_the_text_to_3d_runs() -> None:
    gen = torch.Generator().manual_seed(3)
    camera = sample_cameras(CameraConfig(batch_size=3, height=6, width=9), gen)
    origins, directions = pixel_rays(camera)
    expected = generate_rays(camera.c2w, camera.fovy, 6, 9)
    torch.testing.assert_close(origins[:, None].expand(-1, 54, -1).reshape(-1, 3), expected[0])
    torch.testing.assert_close(directions.reshape(-1, 3), expected[1])


def test_a_ball_is_drawn_as_the_formula_says() -> None:
    """Mask by the discriminant, colour by Lambert's law at the analytic hit."""
    radius, ambient = 0.5, 0.3
    ball = Shape((sphere((0.1, 0.0, 0.0), radius),), (0,), 1, 0.7)
    colour, ground = torch.tensor([0.8, 0.4, 0.2]), torch.tensor([[0.2, 0.5, 0.9]])
    gen = torch.Generator().manual_seed(4)
    camera = sample_cameras(CameraConfig(height=24, width=24, center_perturb=0.05), gen)
    look = Appearance(colour[None, None], torch.tensor([ambient]), flat_background(ground))
    rgb, mask = render_shape(ball, camera, look, supersample=1)

    origin, direction = (v.double() for v in pixel_rays(camera))
    offset = origin - torch.tensor([0.1, 0.0, 0.0])
    b = (direction[0] * offset[0]).sum(-1)
    disc = b * b - (offset[0] ** 2).sum() + radius**2
    clear = disc.abs() > 0.02  # a graze within HIT_DISTANCE counts as a hit
    assert torch.equal((mask[0] > 0.5)[clear], (disc > 0)[clear])
    assert (disc > 0).any() and (disc < 0).any()

    hit = disc > 0.02
    point = origin[0] + (-b - disc.clamp_min(0).sqrt())[..., None] * direction[0]
    normal = (point - torch.tensor([0.1, 0.0, 0.0])) / radius
    light = torch.nn.functional.normalize(camera.light_positions[0].double() - point, dim=-1)
    lambert = (normal * light).sum(-1).clamp_min(0)[..., None]
    expected = colour * (ambient + (1 - ambient) * lambert)
    # the tracer stops within 2e-3 of the surface, a turn of the normal by as much over the radius
    assert (rgb[0][hit] - expected[hit]).abs().max() < 2e-2
    assert (rgb[0][mask[0] == 0] - ground).abs().max() < 1e-4  # logit and back, in f32


def difference(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Share of the pixels in `mask` whose colour differs plainly, by 0.2 in some channel."""
    return float((((a - b).abs().amax(-1) > 0.2) & mask).sum() / mask.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_front_side_and_back_look_different(kind: str) -> None:
    """Also up to a mirror: no view may pass for another one."""
    rgb, mask = render_scene(
        Scene(((kind, "pink"),)), orbit(4, 32), background=(0.5, 0.5, 0.5), supersample=2
    )
    front, side, back = 0, 1, 2
    for a, b in ((front, side), (front, back), (side, back)):
        for other, other_mask in ((rgb[b], mask[b]), (rgb[b].flip(1), mask[b].flip(1))):
            either = (mask[a] + other_mask) > 0
            # least: 0.08, the rocket's side against its back; a turn by 2.5 degrees changes 0.02
            assert difference(rgb[a], other, either) > 0.06, (kind, a, b)


def project(points: np.ndarray, camera: Camera, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel rows and columns of world points, by the pinhole camera's textbook formula."""
    c2w = camera.c2w[view].double().numpy()
    local = (points - c2w[:, 3]) @ c2w[:, :3]
    focal = 0.5 * camera.height / math.tan(0.5 * float(camera.fovy[view]))
    column = focal * local[:, 0] / -local[:, 2] + 0.5 * camera.width
    row = -focal * local[:, 1] / -local[:, 2] + 0.5 * camera.height
    return np.floor(row).astype(int), np.floor(column).astype(int)


def grown(mask: np.ndarray) -> np.ndarray:
    """`mask` with its 8 neighbours."""
    padded = np.pad(mask, 1)
    h, w = mask.shape
    return np.any([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


@pytest.mark.parametrize("kinds", SHAPES, ids="+".join)
def test_silhouettes_are_those_of_the_mesh(kinds: tuple[str, ...]) -> None:
    """Points of a marching-cubes mesh cover the silhouette and nothing else, to a pixel."""
    scene = Scene(tuple((kind, "red") for kind in kinds))
    camera = orbit(3, 40)
    _, masks = render_scene(scene, camera, supersample=1)
    vertices, faces = scene_mesh(scene, resolution=72)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    points, _ = trimesh.sample.sample_surface(mesh, 30_000, seed=0)
    for view in range(3):
        mask = masks[view].numpy() > 0.5
        rows, columns = project(np.asarray(points), camera, view)
        seen = np.zeros_like(mask)
        assert min(rows.min(), columns.min()) >= 0, "the scene leaves the picture"
        seen[rows, columns] = True
        assert not (seen & ~grown(mask)).any(), "the mesh reaches beyond the silhouette"
        assert not (mask & ~grown(seen)).any(), "the silhouette reaches beyond the mesh"
        assert mask.mean() > 0.05


def test_meshes_have_the_scenes_size() -> None:
    vertices, faces = scene_mesh(parse_caption("a red mug"), resolution=64)
    assert faces.shape[1] == 3 and faces.max() < len(vertices)
    assert np.linalg.norm(vertices, axis=1).max() < BOUNDING_RADIUS
    # cup: 0.1 + 0.36 at the front; its rim at z = 0.42, its foot at -0.4; half a cell of tolerance
    half_cell = (0.75 / 63) / 2 + 1e-3
    assert abs(vertices[:, 0].max() - 0.51) < 2 * half_cell  # the eye, 0.44 + 0.07
    assert abs(vertices[:, 2].max() - 0.42) < 2 * half_cell
    assert abs(vertices[:, 2].min() + 0.4) < 2 * half_cell


# ---- captions -----------------------------------------------------------------------------


def test_every_caption_means_its_scene() -> None:
    for kind in KINDS:
        for colour in COLOURS:
            scene = Scene(((kind, colour),))
            assert parse_caption(scene.caption) == scene
            assert parse_caption(f"{scene.caption}, back view") == scene
            assert scene.caption == strip_view(f"{scene.caption}, back view")
    for a, b in zip(KINDS, KINDS[3:] + KINDS[:3], strict=True):
        pair = Scene(((a, "orange"), (b, "white")))
        assert parse_caption(pair.caption) == pair
        assert pair.caption == f"an orange {a} next to a white {b}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red mushroom", "a red mushroom"),
        ("a red mushroom, front view", "a red mushroom"),
        ("  A Red Mushroom , Overhead View ", "a red mushroom"),
        ("a red mushroom side view", "a red mushroom"),
        ("a red mushroom, seen from the side", "a red mushroom, seen from the side"),
        ("a red mushroom, backview", "a red mushroom, backview"),
        ("", ""),
    ],
)
def test_strip_view(text: str, expected: str) -> None:
    assert strip_view(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mushroom",
        "a mushroom",
        "a crimson mushroom",
        "a red dragon",
        "a big red mushroom",
        "a red mushroom on a blue house",
        "a red car next to a blue car next to a green car",
        "a red mushroom next to",
        "🍄",
        "a red\nmushroom\nplease",
        "../../x",
        "${oc.env:HOME}",
        "a red mushroom " * 1000,
    ],
)
def test_other_captions_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(SDIFastError) as error:
        parse_caption(text)
    message = str(error.value)
    assert message.startswith("caption: expected ") and "got " in message
    assert "\n" not in message and len(message) < 1000


def centre(rgb: Tensor, colour: str) -> tuple[float, float]:
    """Mean (row, column) of the pixels near a caption colour, from -1 to 1."""
    near = (rgb - torch.tensor(COLOURS[colour])).abs().amax(-1) < 0.05
    assert near.sum() >= 4, f"no {colour} in the picture"
    rows, columns = torch.nonzero(near).double().mean(0).tolist()
    size = rgb.shape[0] - 1
    return 2 * rows / size - 1, 2 * columns / size - 1


def test_the_first_of_a_pair_is_at_the_left_in_front() -> None:
    scene = parse_caption("a red mushroom next to a blue robot")
    rgb, _ = render_scene(scene, orbit(4, 48), background=(0.5, 0.5, 0.5))
    front, _, back, _ = rgb
    assert centre(front, "red")[1] < -0.2 and centre(front, "blue")[1] > 0.2
    assert centre(back, "red")[1] > 0.2 and centre(back, "blue")[1] < -0.2


def test_objects_face_azimuth_zero_upright() -> None:
    """From +y (azimuth 90) the front is at the left; the mushroom's cap is up."""
    rgb, _ = render_scene(parse_caption("a purple duck"), orbit(4, 48), background=(0.5, 0.5, 0.5))
    beak = torch.tensor((0.97, 0.55, 0.12))
    columns = [
        torch.nonzero((view - beak).abs().amax(-1) < 0.05)[:, 1].double().mean() / 47
        for view in rgb
    ]
    assert columns[1] < 0.4 and columns[3] > 0.6
    cap, _ = render_scene(parse_caption("a red mushroom"), orbit(1, 48))
    assert centre(cap[0], "red")[0] < -0.1


def test_colours_come_from_the_caption() -> None:
    points = torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, -0.4]])  # cap and stem
    for colour in COLOURS:
        albedo = parse_caption(f"a {colour} mushroom").color(points)
        torch.testing.assert_close(albedo[0], torch.tensor(COLOURS[colour]))
        torch.testing.assert_close(albedo[1], torch.tensor((0.93, 0.85, 0.68)))  # cream


def test_public_names_load() -> None:
    for name in toyworld.__all__:
        assert getattr(toyworld, name) is not None
    with pytest.raises(AttributeError):
        toyworld.nothing  # noqa: B018
