"""Volume compositing (methods.md D, Compositing). Twin of ops/composite.py.

alpha = 1 - exp(-density dt), T = exp(-sum of density dt before the sample), w = T alpha.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import Z_VARIANCE_MIN_OPACITY, Z_VARIANCE_WEIGHT_FLOOR
from ..types import Composited, Samples


def composite(
    density: Tensor,  # [N] 1/scene unit, >= 0
    rgb: Tensor,  # [N, 3]
    normal: Tensor,  # [N, 3] unit length
    samples: Samples,
    directions: Tensor,  # [R, 3] unit length
) -> Composited:
    """Per-ray sums over the samples. Differentiable in `density`, `rgb` and `normal`.

    `orient` weighs by detached weights, so its gradient reaches `normal` alone; `weights` is
    detached.
    """
    ray, n_rays = samples.ray_indices, directions.shape[0]
    alpha, transmittance = alpha_and_transmittance(density, samples)
    weights = transmittance * alpha
    t_mid = 0.5 * (samples.t_starts + samples.t_ends)

    opacity = _sum_by_ray(weights, ray, n_rays)
    facing_away = (normal * directions[ray]).sum(dim=-1).clamp_min(0.0)
    return Composited(
        rgb=_sum_by_ray(weights[:, None] * rgb, ray, n_rays),
        opacity=opacity,
        depth=_sum_by_ray(weights * t_mid, ray, n_rays),
        normal_sum=_sum_by_ray(weights[:, None] * normal, ray, n_rays),
        z_variance=_z_variance(weights, t_mid, opacity, ray, n_rays),
        orient=_sum_by_ray(weights.detach() * facing_away.square(), ray, n_rays),
        weights=weights.detach(),
    )


def alpha_and_transmittance(density: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Each sample's opacity and the share of light that reaches it, [N] each, in [0, 1]."""
    optical = density * (samples.t_ends - samples.t_starts)
    before = _optical_depth_before(optical, samples).to(optical.dtype)
    return -torch.expm1(-optical), torch.exp(-before)


def _optical_depth_before(optical: Tensor, samples: Samples) -> Tensor:  # [N] f64
    """Sum over the samples before on the same ray."""
    first = samples.packed_info[samples.ray_indices, 0]  # [N], first sample of the same ray

    def sum_before(values: Tensor) -> Tensor:
        # in f64: the rays' own sums are differences of one running sum over millions of samples
        before = values.double().cumsum(0) - values.double()
        return before - before[first]

    finite = optical.isfinite()
    if bool(finite.all()):
        return sum_before(optical)
    # what is not finite would spoil all rays behind it
    before = sum_before(torch.where(finite, optical, 0.0))
    before = torch.where(sum_before(optical == torch.inf) > 0, torch.inf, before)
    return torch.where(sum_before(optical.isnan()) > 0, torch.nan, before)


def _sum_by_ray(values: Tensor, ray: Tensor, n_rays: int) -> Tensor:
    return values.new_zeros((n_rays, *values.shape[1:])).index_add(0, ray, values)


def _z_variance(
    weights: Tensor, t_mid: Tensor, opacity: Tensor, ray: Tensor, n_rays: int
) -> Tensor:  # [R], scene units^2
    """Variance of the distance under weights normalised along the ray, where O > 0.5."""
    share = weights / opacity.clamp_min(Z_VARIANCE_WEIGHT_FLOOR)[ray]
    centre = _sum_by_ray(share * t_mid, ray, n_rays)
    variance = _sum_by_ray(share * (t_mid - centre[ray]).square(), ray, n_rays)
    return variance * (opacity > Z_VARIANCE_MIN_OPACITY).to(variance.dtype)
