"""Camera rays (methods.md D, Rays). Twin of ops/rays.py.

World frame: z up. Camera frame: x right, y up, looking along -z.
"""

from __future__ import annotations

import torch
from torch import Tensor


def generate_rays(
    c2w: Tensor,  # [B, 3, 4], columns right, up, -look, position
    fovy: Tensor,  # [B] rad, vertical field of view
    height: int,  # pixels
    width: int,  # pixels
) -> tuple[Tensor, Tensor]:
    """Rays through the pixel centres, view-major then row-major.

    Returns origins [B*H*W, 3] (scene units) and directions [B*H*W, 3] (unit length). Not
    differentiable in practice: cameras are given, not learnt.
    """
    focal = 0.5 * height / torch.tan(0.5 * fovy)  # [B] pixels
    column = torch.arange(width, dtype=c2w.dtype, device=c2w.device) + 0.5 - 0.5 * width
    row = torch.arange(height, dtype=c2w.dtype, device=c2w.device) + 0.5 - 0.5 * height
    y, x = torch.meshgrid(-row, column, indexing="ij")  # [H, W]; rows run downwards
    local = torch.stack(
        [
            x / focal[:, None, None],
            y / focal[:, None, None],
            -torch.ones_like(x).expand(len(focal), -1, -1),
        ],
        dim=-1,
    )  # [B, H, W, 3], camera frame
    directions = torch.nn.functional.normalize(
        torch.einsum("bij,bhwj->bhwi", c2w[:, :, :3], local), dim=-1
    )
    origins = c2w[:, None, None, :, 3].expand_as(directions)
    return origins.reshape(-1, 3), directions.reshape(-1, 3)
