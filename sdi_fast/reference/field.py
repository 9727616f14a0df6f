"""The radiance field: density, albedo and normal (methods.md D, MLPs and Density).

Twin of ops/field.py. With e = hash_encode((x + r) / 2r), h = W1 e and
blob(x) = blob_scale (1 - |x| / blob_std):
    logit = w2 . relu(h) + blob(x),  density = softplus(logit)
    albedo = sigmoid(V2 relu(V1 e))
    normal = normalize(-(J^T W1^T (1[h > 0] * w2) / 2r + grad blob)),  J = de/du
The normal needs no derivative through softplus, a positive factor that cancels; written out like
this, first-order autograd gives its exact gradient, which is second order in the field.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..constants import NORMALIZE_EPS
from ..types import FieldParams, FieldSpec
from .hash_encode import hash_encode, hash_encode_with_jacobian

_TINY = 1e-12  # scene units; keeps the blob's slope at the centre 0 instead of 0/0


def density(
    x_world: Tensor,  # [N, 3] scene units, inside [-radius, radius]^3
    params: FieldParams,
    spec: FieldSpec,
    active_levels: int,
) -> Tensor:  # [N], 1/scene unit, >= 0
    """Density alone. Differentiable, twice, in `params` and in `x_world`."""
    features = hash_encode(_unit(x_world, spec), params.table, spec.grid, active_levels)
    hidden = F.linear(features, params.density_w1)
    logit = F.linear(F.relu(hidden), params.density_w2)[:, 0]
    return F.softplus(logit + _blob(x_world, spec))


def field(
    x_world: Tensor,  # [N, 3] scene units, inside [-radius, radius]^3
    params: FieldParams,
    spec: FieldSpec,
    active_levels: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [N], [N, 3] in [0, 1], [N, 3] unit length
    """Density (1/scene unit), albedo and normal. Differentiable in `params`, not in `x_world`."""
    x = x_world.detach()
    features, jacobian = hash_encode_with_jacobian(
        _unit(x, spec), params.table, spec.grid, active_levels
    )
    hidden = F.linear(features, params.density_w1)
    logit = F.linear(F.relu(hidden), params.density_w2)[:, 0]
    albedo = torch.sigmoid(F.linear(F.relu(F.linear(features, params.color_w1)), params.color_w2))

    through_relu = (hidden > 0).to(x.dtype) * params.density_w2  # [N, hidden]
    slope = through_relu @ params.density_w1  # [N, L * F], d net / d features
    gradient = (slope[..., None] * jacobian).sum(dim=1) / (2.0 * spec.radius)
    gradient = gradient + _blob_gradient(x, spec)
    normal = -F.normalize(gradient, dim=-1, eps=NORMALIZE_EPS)
    return F.softplus(logit + _blob(x, spec)), albedo, normal


def _unit(x_world: Tensor, spec: FieldSpec) -> Tensor:
    """The box [-radius, radius]^3 mapped onto [0, 1]^3."""
    return (x_world + spec.radius) / (2.0 * spec.radius)


def _blob(x: Tensor, spec: FieldSpec) -> Tensor:  # [N]
    return spec.blob_scale * (1.0 - torch.linalg.vector_norm(x, dim=-1) / spec.blob_std)


def _blob_gradient(x: Tensor, spec: FieldSpec) -> Tensor:  # [N, 3], 1/scene unit
    distance = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_TINY)
    return -spec.blob_scale / spec.blob_std * x / distance
