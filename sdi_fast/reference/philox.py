"""Philox4x32-10 and Box-Muller, bit by bit what the kernels compute (csrc/math/philox.h).

A stream is a pair (seed, offset). Draw number d of it gives every sample b as many normals as are
asked for, four a counter: key = seed, counter = (group of four, b, offset + d); all integers are
taken modulo 2^32 or, seed and offset, 2^64. u = (word + 1/2) / 2^32 in f32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # i64, below 2^32
    key: tuple[Tensor, Tensor],  # i64, below 2^32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words, i64 below 2^32; i64 products wrap, which leaves their 64 bits right."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        even, odd = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((odd >> 32) & MASK) ^ c1 ^ k0,
            odd & MASK,
            ((even >> 32) & MASK) ^ c3 ^ k1,
            even & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def philox_normal(
    rng: Tensor,  # [2] i64: seed, offset
    draw: int,
    batch_size: int,
    n: int,  # numbers a sample
) -> Tensor:
    """Standard normal numbers, [batch_size, n] f32; `rng` stays as it is. No host sync."""
    group = torch.arange((n + 3) // 4, device=rng.device)[None, :]
    sample = torch.arange(batch_size, device=rng.device)[:, None]
    group, sample = torch.broadcast_tensors(group & MASK, sample & MASK)
    seed, offset = rng[0], rng[1] + draw
    counter = (group, sample, offset & MASK, (offset >> 32) & MASK)
    words = philox(counter, (seed & MASK, (seed >> 32) & MASK))
    uniform = [w.to(torch.float32) * 2.0**-32 + 2.0**-33 for w in words]
    normals = []
    for u, v in (uniform[:2], uniform[2:]):
        radius, angle = (-2.0 * u.log()).sqrt(), v * (2.0 * math.pi)
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, dim=-1).flatten(1)[:, :n]
