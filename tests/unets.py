"""UNets with random weights, from small ones to SD 2.1-base, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

N_TOKENS = 7
SD21 = dict(  # stabilityai/stable-diffusion-2-1-base
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    cross_attention_dim=1024,
    attention_head_dim=[5, 10, 20, 20],
    use_linear_projection=True,
)


def build(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**settings)


def sd21_topology(**changes: Any) -> Any:
    """Four levels, linear projections and 1 to 3 heads, at a twentieth of the width."""
    settings: dict[str, Any] = dict(
        sample_size=16,
        block_out_channels=(16, 32, 48, 48),
        cross_attention_dim=24,
        attention_head_dim=[1, 2, 3, 3],
        use_linear_projection=True,
        norm_num_groups=8,
    )
    return build(**{**settings, **changes})


def sd15_topology() -> Any:
    """8 heads at every level, 1 x 1 convolutions as projections, two transformer blocks."""
    return sd21_topology(
        attention_head_dim=8, use_linear_projection=False, transformer_layers_per_block=2
    )


def randomise(unet: Any, bias_std: float = 0.3) -> Any:
    for parameter in unet.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=bias_std)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def inputs(
    unet: Any, batch: int, n_conditions: int, size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Different t in the rows, the first negative."""
    size = size or unet.config.sample_size
    x = torch.randn(batch, 4, size, size)
    t = torch.tensor([-99, 0, 731, 999][:batch])
    context = torch.randn(n_conditions * batch, N_TOKENS, unet.config.cross_attention_dim)
    return x, t, context
