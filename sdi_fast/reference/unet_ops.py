"""What the frozen UNet does between its matrix products. Twins of ops/unet_ops.py.

Activations are channels-last, [B, N, C] with N = h w. Sums and statistics are in f32. A `shift` is
a bias that has not been added yet: it is added here, for nothing, before the norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm(
    parts: Sequence[Tensor],  # 1 or 2 of [B, N, C_i]: normalised as if concatenated
    weight: Tensor,  # [C] f32
    bias: Tensor,  # [C] f32
    shift: Tensor | None,  # [B or 1, C], added first
    *,
    n_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Group norm over N and a group's channels, then SiLU where asked for, [B, N, C]."""
    x = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
    b, n, c = x.shape
    value = x.float()
    if shift is not None:
        value = value + shift.float()[:, None]
    grouped = value.view(b, n, n_groups, c // n_groups)
    variance, mean = torch.var_mean(grouped, dim=(1, 3), keepdim=True, correction=0)
    normed = ((grouped - mean) * torch.rsqrt(variance + eps)).view(b, n, c)
    normed = normed * weight.float() + bias.float()
    return (F.silu(normed) if silu else normed).to(x.dtype)


def layer_norm(
    x: Tensor,  # [M, C]
    weight: Tensor,  # [C] f32
    bias: Tensor,  # [C] f32
    shift: Tensor | None,  # [C] f32, added first
    *,
    eps: float,
) -> Tensor:
    """Layer norm over the channels, [M, C]."""
    value = x.float() if shift is None else x.float() + shift.float()
    return F.layer_norm(value, value.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def geglu(
    x: Tensor,  # [M, 2 F]: values, then gates
    bias: Tensor,  # [2 F] f32, added first
) -> Tensor:
    """value * gelu(gate), with the exact (erf) gelu, [M, F]."""
    value, gate = (x.float() + bias.float()).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


def linear_geglu(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [2 F, K], as torch.nn.Linear has it: values, then gates
    bias: Tensor,  # [2 F] f32
) -> Tensor:
    """geglu of the linear map, without rounding in between, [M, F]."""
    return geglu(x.float() @ weight.float().t(), bias).to(x.dtype)


def interleave_phases(
    x: Tensor,  # [B, H + 1, W + 1, 4 C]: the four phases (0, 0), (0, 1), (1, 0), (1, 1)
) -> Tensor:
    """out[:, 2 i + a, 2 j + b] = x[:, i + a, j + b, phase (a, b)], [B, 2 H, 2 W, C]."""
    b, h, w, c = x.shape[0], x.shape[1] - 1, x.shape[2] - 1, x.shape[3] // 4
    phases = x.view(b, h + 1, w + 1, 2, 2, c)
    rows = []
    for i in (0, 1):
        row = [phases[:, i : i + h, j : j + w, i, j] for j in (0, 1)]
        rows.append(torch.stack(row, dim=3))  # [B, H, W, 2, C]
    return torch.stack(rows, dim=2).reshape(b, 2 * h, 2 * w, c)
