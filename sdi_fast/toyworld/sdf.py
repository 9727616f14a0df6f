"""Signed distance functions of simple solids, and the ways to join them.

World frame as in types.py. A solid is a function of three coordinate tensors of one shape that
returns a lower bound of the signed distance (negative inside), in scene units; every solid here
is 1-Lipschitz, so that sphere tracing never steps through a surface. Coordinates come apart
because the renderer evaluates millions of points and reductions over a last axis of 3 are slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

Solid = Callable[[Tensor, Tensor, Tensor], Tensor]
Vec = tuple[float, float, float]


def _length(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y + z * z)


def sphere(center: Vec, radius: float) -> Solid:
    cx, cy, cz = center
    return lambda x, y, z: _length(x - cx, y - cy, z - cz) - radius


def ellipsoid(center: Vec, radii: Vec) -> Solid:
    """A lower bound (|p / r| - 1) min(r): exact only for a sphere, but always 1-Lipschitz."""
    (cx, cy, cz), (rx, ry, rz) = center, radii
    least = min(radii)
    return lambda x, y, z: (_length((x - cx) / rx, (y - cy) / ry, (z - cz) / rz) - 1.0) * least


def box(center: Vec, half: Vec, rounding: float = 0.03) -> Solid:
    """A box with rounded edges; `half` is its outer half size, rounding included."""
    cx, cy, cz = center
    hx, hy, hz = (h - rounding for h in half)

    def solid(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        qx, qy, qz = (x - cx).abs() - hx, (y - cy).abs() - hy, (z - cz).abs() - hz
        outside = _length(qx.clamp_min(0), qy.clamp_min(0), qz.clamp_min(0))
        return outside + torch.maximum(torch.maximum(qx, qy), qz).clamp_max(0) - rounding

    return solid


def capsule(start: Vec, end: Vec, radius: float) -> Solid:
    """All points within `radius` of the segment from `start` to `end`."""
    ax, ay, az = start
    bx, by, bz = (e - s for s, e in zip(start, end, strict=True))
    norm2 = bx * bx + by * by + bz * bz

    def solid(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        px, py, pz = x - ax, y - ay, z - az
        h = ((px * bx + py * by + pz * bz) / norm2).clamp(0.0, 1.0)
        return _length(px - h * bx, py - h * by, pz - h * bz) - radius

    return solid


def rod(start: Vec, end: Vec, radius: float, end_radius: float | None = None) -> Solid:
    """A cylinder or a truncated cone with flat ends, along any axis.

    The maximum of the slab and of the cone's side: a lower bound outside the rims.
    """
    ra, rb = radius, radius if end_radius is None else end_radius
    ax, ay, az = start
    bx, by, bz = (e - s for s, e in zip(start, end, strict=True))
    length = math.sqrt(bx * bx + by * by + bz * bz)
    ux, uy, uz = bx / length, by / length, bz / length
    slope = (rb - ra) / length
    cosine = 1.0 / math.sqrt(1.0 + slope * slope)

    def solid(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        px, py, pz = x - ax, y - ay, z - az
        h = px * ux + py * uy + pz * uz
        r = _length(px - h * ux, py - h * uy, pz - h * uz)
        side = (r - ra - slope * h) * cosine
        return torch.maximum(side, (h - 0.5 * length).abs() - 0.5 * length)

    return solid


def torus(center: Vec, axis: str, radius: float, thickness: float) -> Solid:
    """A ring round the axis "x", "y" or "z"; `thickness` is the tube's radius."""
    cx, cy, cz = center

    def solid(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        p = {"x": x - cx, "y": y - cy, "z": z - cz}
        along = p.pop(axis)
        u, v = p.values()
        ring = torch.sqrt(u * u + v * v) - radius
        return torch.sqrt(ring * ring + along * along) - thickness

    return solid


def hull(*planes: tuple[Vec, float]) -> Solid:
    """The intersection of half spaces n . p <= d; each n is normalised together with its d."""
    scaled = []
    for (nx, ny, nz), d in planes:
        norm = math.sqrt(nx * nx + ny * ny + nz * nz)
        scaled.append((nx / norm, ny / norm, nz / norm, d / norm))

    def solid(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        faces = [nx * x + ny * y + nz * z - d for nx, ny, nz, d in scaled]
        return reduce(torch.maximum, faces)

    return solid


def union(*solids: Solid) -> Solid:
    return lambda x, y, z: reduce(torch.minimum, [s(x, y, z) for s in solids])


def intersection(*solids: Solid) -> Solid:
    return lambda x, y, z: reduce(torch.maximum, [s(x, y, z) for s in solids])


def cut(solid: Solid, tool: Solid) -> Solid:
    """`solid` without `tool`."""
    return lambda x, y, z: torch.maximum(solid(x, y, z), -tool(x, y, z))


def blend(width: float, *solids: Solid) -> Solid:
    """Smooth union: the joint is rounded over `width`. Its gradient is a convex combination."""

    def pair(a: Tensor, b: Tensor) -> Tensor:
        h = (0.5 + 0.5 * (b - a) / width).clamp(0.0, 1.0)
        return b + (a - b) * h - width * h * (1.0 - h)

    return lambda x, y, z: reduce(pair, [s(x, y, z) for s in solids])


def mirrored(solid: Solid) -> Solid:
    """`solid` together with its mirror image across the plane y = 0; `solid` lies in y >= 0."""
    return lambda x, y, z: solid(x, y.abs(), z)


def placed(solid: Solid, offset: Vec, scale: float) -> Solid:
    """`solid` scaled about the origin and then moved by `offset`."""
    ox, oy, oz = offset
    inv = 1.0 / scale
    return lambda x, y, z: solid((x - ox) * inv, (y - oy) * inv, (z - oz) * inv) * scale
