"""Point-light shading (methods.md D, Shading). Twin of ops/shade.py."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..constants import AMBIENT_LIGHT, DIFFUSE_LIGHT, NORMALIZE_EPS, SHADINGS
from ..types import SDIFastError


def shade(
    albedo: Tensor,  # [N, 3] in [0, 1]
    normal: Tensor,  # [N, 3] unit length, world frame
    x_world: Tensor,  # [N, 3] scene units
    light_positions: Tensor,  # [B, 3] scene units
    view_indices: Tensor,  # [N] i64, the view (and light) of each sample
    shading: str,  # "albedo", "textureless" or "diffuse"
) -> Tensor:  # [N, 3] in [0, 1]
    """Colour of each sample. Differentiable in `albedo` and `normal`.

    light = 0.1 + 0.9 max(0, n . l), l = normalize(light - x); textureless is the light alone,
    diffuse is albedo * light.
    """
    if shading not in SHADINGS:
        raise SDIFastError(f"shading: expected one of {', '.join(SHADINGS)}, got {shading!r}")
    if shading == "albedo":
        return albedo
    to_light = F.normalize(light_positions[view_indices] - x_world, dim=-1, eps=NORMALIZE_EPS)
    lambert = (normal * to_light.detach()).sum(dim=-1, keepdim=True).clamp_min(0.0)
    light = AMBIENT_LIGHT + DIFFUSE_LIGHT * lambert
    return light.expand(-1, 3) if shading == "textureless" else albedo * light
