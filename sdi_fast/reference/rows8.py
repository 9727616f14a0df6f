"""Rows of activations in e4m3, and products of them. Twins of ops/rows8.py.

A row is values [K] in e4m3 and one f32 scale: x = values scale. The scale puts the row's largest
magnitude at 448, where e4m3 ends, so that nothing overflows: magnitudes down to 1 / 28,672 of it
keep a relative error of at most 2^-4, smaller ones an absolute one. A row of zeros stays zeros; an
infinity becomes 448 and a NaN stays one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MIN_AMAX = 1e-30  # of a row: what is smaller is rounded to zero; keeps 448 / amax finite
MAX_AMAX = torch.finfo(torch.float32).max
Rows8 = tuple[Tensor, Tensor]  # values [M, K] e4m3, scale [M, 1] f32


def _quantise(
    value: Tensor,  # [M, K] f32
) -> Rows8:
    amax = value.abs().amax(1, keepdim=True) if value.shape[1] else value.new_zeros(len(value), 1)
    amax = amax.clamp(MIN_AMAX, MAX_AMAX)
    scaled = value * (E4M3_MAX / amax)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), amax * (1.0 / E4M3_MAX)


def quantise_rows(
    x: Tensor,  # [M, K]
) -> Rows8:
    """The rows in e4m3."""
    return _quantise(x.float())


def layer_norm8(
    x: Tensor,  # [M, C]
    added: Tensor | None,  # [M, C], added to x in place first
    weight: Tensor,  # [C] f32
    bias: Tensor,  # [C] f32
    shift: Tensor | None,  # [C] f32, added for the norm alone
    *,
    eps: float,
) -> Rows8:
    """Layer norm over the channels, in e4m3."""
    if added is not None:
        x.add_(added)
    value = x.float() if shift is None else x.float() + shift.float()
    return _quantise(F.layer_norm(value, value.shape[-1:], weight.float(), bias.float(), eps))


def geglu8(
    x: Tensor,  # [M, 2 F]: values, then gates
    bias: Tensor,  # [2 F] f32, added first
) -> Rows8:
    """value * gelu(gate), with the exact (erf) gelu, in e4m3."""
    value, gate = (x.float() + bias.float()).chunk(2, dim=-1)
    return _quantise(value * F.gelu(gate))


def linear8(
    x: Tensor,  # [M, K] e4m3
    x_scale: Tensor,  # [M, 1] f32
    weight: Tensor,  # [K, N] e4m3
    weight_scale: Tensor,  # [1, N] f32
    *,
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """The product, [M, N]; sums in f32, scaled at their end."""
    return (torch.mm(x.float(), weight.float()) * x_scale * weight_scale).to(dtype)
