"""Environment background (methods.md D, Background). Twin of ops/background.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def background(
    directions: Tensor,  # [R, 3] unit length
    w1: Tensor,  # [16, 9], as torch.nn.Linear's
    w2: Tensor,  # [16, 16]
    w3: Tensor,  # [3, 16]
) -> Tensor:  # [R, 3] in [0, 1]
    """Colour seen along each direction. Differentiable in the weights."""
    hidden = F.relu(F.linear(spherical_harmonics(directions), w1))
    hidden = F.relu(F.linear(hidden, w2))
    return torch.sigmoid(F.linear(hidden, w3))


def spherical_harmonics(directions: Tensor) -> Tensor:  # [R, 3] -> [R, 9]
    """Real spherical harmonics of bands 0 to 2, with tiny-cuda-nn's order and signs."""
    x, y, z = directions.unbind(-1)
    return torch.stack(
        [
            torch.full_like(x, 0.28209479177387814),
            -0.48860251190291987 * y,
            0.48860251190291987 * z,
            -0.48860251190291987 * x,
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.94617469575755997 * z * z - 0.31539156525251999,
            -1.0925484305920792 * x * z,
            0.54627421529603959 * (x * x - y * y),
        ],
        dim=-1,
    )
