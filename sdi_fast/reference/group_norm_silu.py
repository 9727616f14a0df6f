"""Group norm and SiLU, forward and the gradient of the input. Twin of ops/group_norm_silu.py."""

from __future__ import annotations

import torch
from torch import Tensor


def group_norm_silu_fwd(
    x: Tensor,  # [B, P, C]
    shift: Tensor | None,  # [C], added to x first
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    n_groups: int,
    eps: float,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """silu(gn(x + shift)) like x, and mean and 1 / std of each group, [2, B, G] f32 or f64."""
    h = _widened(x, shift)
    groups = h.unflatten(2, (n_groups, -1))
    mean = groups.mean((1, 3), keepdim=True)
    rstd = (groups.var((1, 3), correction=0, keepdim=True) + eps).rsqrt()
    y = ((groups - mean) * rstd).flatten(2) * weight.to(h.dtype) + bias.to(h.dtype)
    if silu:
        y = y * torch.sigmoid(y)
    return y.to(x.dtype), torch.stack([mean.flatten(1), rstd.flatten(1)])


def group_norm_silu_bwd(
    grad: Tensor,  # [B, P, C], of y
    x: Tensor,  # [B, P, C], and so on, as in the forward
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,  # [2, B, G], from the forward
    addend: Tensor | None = None,  # [B, P, C]: added to the result, the gradient of a shortcut
    silu: bool = True,
) -> Tensor:
    """The gradient of x, [B, P, C]."""
    h = _widened(x, shift)
    mean, rstd = statistics[:, :, None, :, None]
    normal = (h.unflatten(2, (statistics.shape[2], -1)) - mean) * rstd
    g = grad.to(h.dtype)
    if silu:
        y = normal.flatten(2) * weight.to(h.dtype) + bias.to(h.dtype)
        s = torch.sigmoid(y)
        g = g * (s * (1.0 + y * (1.0 - s)))
    g = (g * weight.to(h.dtype)).unflatten(2, (statistics.shape[2], -1))
    along = (g * normal).mean((1, 3), keepdim=True)
    grad_x = (rstd * (g - g.mean((1, 3), keepdim=True) - normal * along)).flatten(2)
    if addend is not None:
        grad_x = grad_x + addend.to(h.dtype)
    return grad_x.to(x.dtype)


def _widened(x: Tensor, shift: Tensor | None) -> Tensor:
    """x + shift in f32 at least."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return h if shift is None else h + shift.to(h.dtype)
