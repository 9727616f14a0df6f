"""From cameras to per-ray sums in one go (methods.md D). Twin of ops/render_views.py.

The stages one after another: rays, marching, density, pruning, field, shading, compositing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Camera, FieldParams, FieldSpec, MarchSpec, RaySums
from .composite import composite
from .field import density, field
from .march import march
from .prune import prune
from .rays import generate_rays
from .shade import shade


def render_views(
    camera: Camera,
    params: FieldParams,
    spec: FieldSpec,
    active_levels: int,
    occupancy: Tensor,  # [G, G, G] bool, index (x, y, z)
    marching: MarchSpec,
    shading: str,  # "albedo", "textureless" or "diffuse"
    *,
    alpha_bound: Tensor | None = None,  # [] density * dt; the threshold where that is lower
    jitter: Tensor | None = None,  # [R] scene units, in [0, step_size)
) -> RaySums:
    """Per-ray sums over the samples that can be seen. Differentiable in `params`."""
    origins, directions = generate_rays(camera.c2w, camera.fovy, camera.height, camera.width)
    with torch.no_grad():
        tried = march(
            origins, directions, occupancy, spec.radius, marching.step_size, marching.near, jitter
        )
        x = _middles(origins, directions, tried.ray_indices, tried.t_starts, tried.t_ends)
        threshold = marching.alpha_threshold
        if alpha_bound is not None:
            threshold = min(threshold, float(alpha_bound))
        sigma = density(x, params, spec, active_levels)
        kept = prune(tried, sigma, marching.early_stop_eps, threshold)
    x = _middles(origins, directions, kept.ray_indices, kept.t_starts, kept.t_ends)
    sigma, albedo, normal = field(x, params, spec, active_levels)
    view = kept.ray_indices // (camera.height * camera.width)
    rgb = shade(albedo, normal, x, camera.light_positions, view, shading)
    sums = composite(sigma, rgb, normal, kept, directions)
    return RaySums(
        rgb=sums.rgb,
        opacity=sums.opacity,
        depth=sums.depth,
        normal_sum=sums.normal_sum,
        z_variance=sums.z_variance,
        orient=sums.orient,
        counts=torch.tensor([kept.n_samples, tried.n_samples], device=x.device),
    )


def _middles(
    origins: Tensor, directions: Tensor, ray: Tensor, t_starts: Tensor, t_ends: Tensor
) -> Tensor:
    """Midpoints of the samples, [N, 3] in scene units."""
    middle = 0.5 * (t_starts + t_ends)
    return torch.addcmul(origins[ray], directions[ray], middle[:, None])
