"""Renders toyworld's scenes by sphere tracing, many views at once.

Rays as methods.md D; colour = albedo * (ambient + (1 - ambient) max(0, n . l)) under the camera's
point light. All images of a batch show one shape (one distance function); the objects' colours,
the cameras, the lights and the backgrounds differ by image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..types import Camera
from .scenes import Scene, Shape

MAX_TRACE_STEPS = 48
COMPACT_EVERY = 4  # steps between dropping the rays that hit or missed
HIT_DISTANCE = 2e-3  # scene units; a pixel is about 0.03 at the usual distance
NORMAL_STEP = 4e-3  # scene units, half width of the central difference
SH_DEGREE3 = 9  # spherical-harmonic values up to l = 2, what the NeRF's environment sees


@dataclass(frozen=True)
class Appearance:
    """What varies by image besides the camera."""

    main_colours: Tensor  # [B, n_objects, 3], in [0, 1]
    ambient: Tensor  # [B], in [0, 1]; 1 is flat albedo
    background: Tensor  # [B, 9, 3], logits of a background that is smooth in the direction


def sh_basis(directions: Tensor) -> Tensor:
    """[..., 9] spherical harmonics up to degree 2 of unit `directions` [..., 3]."""
    x, y, z = directions.unbind(-1)
    one = torch.full_like(x, 0.28209479)
    return torch.stack(
        [
            one,
            -0.48860251 * y,
            0.48860251 * z,
            -0.48860251 * x,
            1.09254843 * x * y,
            -1.09254843 * y * z,
            0.94617470 * z * z - 0.31539157,
            -1.09254843 * x * z,
            0.54627421 * (x * x - y * y),
        ],
        dim=-1,
    )


def flat_background(rgb: Tensor) -> Tensor:
    """Background logits [B, 9, 3] of one colour an image, `rgb` [B, 3] in [0, 1]."""
    background = rgb.new_zeros(rgb.shape[0], SH_DEGREE3, 3)
    background[:, 0] = torch.logit(rgb, eps=1e-4) / 0.28209479
    return background


def random_appearance(main_colours: Tensor, generator: torch.Generator) -> Appearance:
    """Lights and backgrounds of the training set for `main_colours` [B, n, 3].

    Half of the images are nearly flat albedo, since that is what the NeRF shows most of the time.
    Backgrounds: a third grey, a fifth one colour, the rest smooth in the direction, as the NeRF's
    environment is.
    """
    b, device = main_colours.shape[0], main_colours.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    ambient = torch.where(uniform(b) < 0.5, 0.93 + 0.07 * uniform(b), 0.5 + 0.45 * uniform(b))
    colour = 0.05 + 0.9 * uniform(b, 3)
    grey = 0.05 + 0.9 * uniform(b, 1).expand(b, 3)
    which = uniform(b)
    grey_share, colour_share = 0.3, 0.5
    base = torch.where((which < grey_share)[:, None], grey, colour)
    noise = torch.randn(b, SH_DEGREE3, 3, generator=generator, device=device)
    smooth = flat_background(colour) + noise * (0.3 + 1.5 * uniform(b, 1, 1))
    background = torch.where((which < colour_share)[:, None, None], flat_background(base), smooth)
    return Appearance(main_colours, ambient, background)


def pixel_rays(camera: Camera) -> tuple[Tensor, Tensor]:
    """Origins [B, 3] and unit directions [B, H, W, 3] (methods.md D, Rays)."""
    h, w, device = camera.height, camera.width, camera.c2w.device
    focal = 0.5 * h / torch.tan(0.5 * camera.fovy)  # [B], pixels
    i = torch.arange(w, device=device, dtype=torch.float32) + 0.5 - 0.5 * w
    j = torch.arange(h, device=device, dtype=torch.float32) + 0.5 - 0.5 * h
    x = (i[None, None, :] / focal[:, None, None]).expand(-1, h, w)
    y = (-j[None, :, None] / focal[:, None, None]).expand(-1, h, w)
    local = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
    directions = torch.einsum("bij,bhwj->bhwi", camera.c2w[:, :, :3], local)
    return camera.c2w[:, :, 3], torch.nn.functional.normalize(directions, dim=-1)


def trace(shape: Shape, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """First hits of rays with `shape`.

    origins [R, 3], directions [R, 3] -> (indices [K] i64 of the rays that hit, points [K, 3]).
    Rays start where they enter the bounding sphere and end where they leave it; every few steps
    those that are done are dropped.
    """
    b = (origins * directions).sum(-1)
    disc = b * b - (origins * origins).sum(-1) + shape.bounding_radius**2
    root = disc.clamp_min(0).sqrt()
    active = torch.nonzero((disc > 0) & (root > b))[:, 0]
    ox, oy, oz = origins[active].unbind(-1)
    dx, dy, dz = directions[active].unbind(-1)
    t = (-b - root)[active].clamp_min(0)
    far = (root - b)[active]
    hit_rays, hit_t = [], []
    for step in range(1, MAX_TRACE_STEPS + 1):
        distance = shape.distance(ox + t * dx, oy + t * dy, oz + t * dz)
        if step % COMPACT_EVERY and step < MAX_TRACE_STEPS:
            t = t + distance  # a ray at the surface barely moves: no mask is needed
            continue
        hit = distance.abs() < HIT_DISTANCE
        hit_rays.append(active[hit])
        hit_t.append(t[hit])
        keep = torch.nonzero(~hit & (t < far))[:, 0]
        active, far, t = active[keep], far[keep], (t + distance)[keep]
        ox, oy, oz, dx, dy, dz = (v[keep] for v in (ox, oy, oz, dx, dy, dz))
    rays, depth = torch.cat(hit_rays), torch.cat(hit_t)
    return rays, origins[rays] + depth[:, None] * directions[rays]


def surface_normal(shape: Shape, points: Tensor) -> Tensor:
    """Unit normals [K, 3] at `points` [K, 3] by the tetrahedron's four differences."""
    x, y, z = points.unbind(-1)
    e = NORMAL_STEP
    a = shape.distance(x + e, y - e, z - e)
    b = shape.distance(x - e, y - e, z + e)
    c = shape.distance(x - e, y + e, z - e)
    d = shape.distance(x + e, y + e, z + e)
    n = torch.stack([a - b - c + d, -a - b + c + d, -a + b - c + d], dim=-1)
    return torch.nn.functional.normalize(n, dim=-1)


def render_shape(
    shape: Shape, camera: Camera, appearance: Appearance, supersample: int = 2
) -> tuple[Tensor, Tensor]:
    """Images of one shape: (rgb [B, H, W, 3] in [0, 1], mask [B, H, W] in [0, 1]).

    `supersample` rays a side of each pixel are averaged.
    """
    h, w, s, b = camera.height, camera.width, supersample, camera.batch_size
    fine = replace(camera, height=h * s, width=w * s)
    origins, directions = pixel_rays(fine)
    per_view = h * w * s * s
    flat_directions = directions.reshape(-1, 3)
    flat_origins = origins[:, None].expand(-1, per_view, -1).reshape(-1, 3)
    rgb = torch.sigmoid(
        torch.bmm(sh_basis(directions).reshape(b, per_view, SH_DEGREE3), appearance.background)
    ).reshape(-1, 3)
    rays, points = trace(shape, flat_origins, flat_directions)
    view = rays // per_view
    albedo = shape.palette(appearance.main_colours)[view, shape.nearest(*points.unbind(-1))]
    to_light = torch.nn.functional.normalize(camera.light_positions[view] - points, dim=-1)
    lambert = (surface_normal(shape, points) * to_light).sum(-1).clamp_min(0)
    ambient = appearance.ambient[view]
    rgb[rays] = albedo * (ambient + (1.0 - ambient) * lambert)[:, None]
    mask = torch.zeros(b * per_view, device=rgb.device)
    mask[rays] = 1.0
    image = rgb.reshape(b, h, s, w, s, 3).mean(dim=(2, 4))
    return image, mask.reshape(b, h, s, w, s).mean(dim=(2, 4))


def render_scene(
    scene: Scene,
    camera: Camera,
    *,
    ambient: float = 1.0,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    supersample: int = 2,
) -> tuple[Tensor, Tensor]:
    """The ground truth of a caption: (rgb [B, H, W, 3], mask [B, H, W]), both in [0, 1].

    Flat albedo on a plain background unless told otherwise.
    """
    b, device = camera.batch_size, camera.c2w.device
    appearance = Appearance(
        scene.main_colours(device).expand(b, -1, -1),
        torch.full((b,), ambient, device=device),
        flat_background(torch.tensor([background], device=device).expand(b, 3)),
    )
    return render_shape(scene.shape, camera, appearance, supersample)
