"""A UNet of Stable Diffusion 2.1-base's size with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TFLOP_A_SAMPLE = 0.804  # one call, 64 x 64 latents, 77 tokens
UNET: dict[str, Any] = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
    cross_attention_dim=1024,
    attention_head_dim=[5, 10, 20, 20],
    use_linear_projection=True,
    norm_num_groups=32,
    act_fn="silu",
)


def make_unet(device: str = "cuda") -> Any:
    """Random weights and norms, f32, frozen."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**UNET)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return unet.eval().requires_grad_(False)
