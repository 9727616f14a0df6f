"""Ray marching through the occupancy grid (methods.md D, Marching). Twin of ops/march.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Samples

_CHUNK_SAMPLES = 1 << 21  # candidate samples held at once


def march(
    origins: Tensor,  # [R, 3] scene units
    directions: Tensor,  # [R, 3] unit length
    occupancy: Tensor,  # [G, G, G] bool, indexed (x, y, z), over [-radius, radius]^3
    radius: float,  # scene units, half side of the box
    step_size: float,  # scene units
    near: float,  # scene units
    jitter: Tensor | None,  # [R] scene units in [0, step_size), or none
) -> Samples:
    """Whole steps whose midpoint lies in an occupied cell.

    Sample k of a ray is [t0 + k dt, t0 + (k + 1) dt] with t0 = near + jitter and k >= 0: the
    lattice is anchored at the ray's start, not at the box. Cells are half-open, so a midpoint
    exactly on the box's upper face lies outside. No gradient.
    """
    n_rays = origins.shape[0]
    start = origins.new_full((n_rays,), near)
    if jitter is not None:
        start = start + jitter
    first, count = _step_range(origins, directions, radius, step_size, start)
    longest = int(count.max()) if n_rays else 0
    rays_at_once = max(_CHUNK_SAMPLES // max(longest, 1), 1)

    kept: list[tuple[Tensor, Tensor]] = []  # (ray, step) of each sample, in order
    for begin in range(0, n_rays if longest else 0, rays_at_once):
        chunk = slice(begin, begin + rays_at_once)
        steps = first[chunk, None] + torch.arange(longest, device=origins.device)  # [C, K]
        near_end, far_end = _interval(start[chunk, None], steps, step_size)
        middle = 0.5 * (near_end + far_end)
        points = origins[chunk, None] + directions[chunk, None] * middle[..., None]
        ray, column = torch.nonzero(_is_occupied(points, occupancy, radius), as_tuple=True)
        kept.append((ray + begin, steps[ray, column]))

    empty = torch.empty(0, dtype=torch.int64, device=origins.device)
    ray_indices = torch.cat([ray for ray, _ in kept]) if kept else empty
    steps = torch.cat([step for _, step in kept]) if kept else empty
    t_starts, t_ends = _interval(start[ray_indices], steps, step_size)
    return Samples(ray_indices, t_starts, t_ends, pack(ray_indices, n_rays))


def pack(ray_indices: Tensor, n_rays: int) -> Tensor:
    """packed_info [R, 2] of sorted ray indices [N]: first sample and number of samples."""
    count = torch.bincount(ray_indices, minlength=n_rays)
    return torch.stack([count.cumsum(0) - count, count], dim=-1)


def _interval(start: Tensor, steps: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
    k = steps.to(start.dtype)
    return start + k * step_size, start + (k + 1) * step_size


def _step_range(
    origins: Tensor, directions: Tensor, radius: float, step_size: float, start: Tensor
) -> tuple[Tensor, Tensor]:
    """First step [R] i64 and number of steps [R] i64 that cover each ray's way through the box.

    Generous by a step at both ends: the cell test is what decides.
    """
    to_low = (-radius - origins) / directions  # +-inf along axes that the ray does not move on
    to_high = (radius - origins) / directions
    enter = torch.minimum(to_low, to_high).nan_to_num(nan=-torch.inf).amax(dim=-1)
    leave = torch.maximum(to_low, to_high).nan_to_num(nan=torch.inf).amin(dim=-1)
    first = ((enter - start) / step_size - 0.5).floor().clamp_min(1.0) - 1.0
    last = ((leave - start) / step_size - 0.5).ceil() + 1.0
    hit = (leave >= enter) & (last > first)
    first = torch.where(hit, first, 0.0)
    count = torch.where(hit, last - first, 0.0)
    return first.long(), count.long()


def _is_occupied(points: Tensor, occupancy: Tensor, radius: float) -> Tensor:
    """Whether the cells of points [..., 3] exist and are occupied."""
    resolution = occupancy.shape[0]
    cell = ((points + radius) / (2.0 * radius) * resolution).floor().long()
    inside = ((cell >= 0) & (cell < resolution)).all(dim=-1)
    x, y, z = cell.clamp(0, resolution - 1).unbind(-1)
    return inside & occupancy[x, y, z]
