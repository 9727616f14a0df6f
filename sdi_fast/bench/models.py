"""Stable Diffusion 2.1-base's size with random weights: as fast as the trained one, and here."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..config import ModelConfig
from ..constants import VIEW_NAMES
from ..diffusion.pipeline import Pipeline, assemble, quiet_libraries, resolve_dtype
from ..diffusion.prompt import PromptEmbeddings
from ..diffusion.schedule import DDIMSchedule

TEXT_SHAPE = (77, 1024)  # tokens, width
TFLOP_A_SAMPLE = 0.804  # one call of the UNet, 64 x 64 latents, 77 tokens
UNET: dict[str, Any] = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
    cross_attention_dim=TEXT_SHAPE[1],
    attention_head_dim=[5, 10, 20, 20],
    use_linear_projection=True,
    norm_num_groups=32,
    act_fn="silu",
)
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=768,
)


def make_unet(device: torch.device | str = "cuda") -> Any:
    """Random weights and norms, f32, frozen."""
    from diffusers import UNet2DConditionModel

    return _random(UNet2DConditionModel, UNET, device)


def make_vae(device: torch.device | str = "cuda") -> Any:
    """Random weights and norms, f32, frozen."""
    from diffusers import AutoencoderKL

    return _random(AutoencoderKL, VAE, device)


def _random(cls: Any, settings: dict[str, Any], device: torch.device | str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = cls(**settings)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return model.eval().requires_grad_(False)


def sd_schedule(device: torch.device | str = "cuda") -> DDIMSchedule:
    """SD 2.1-base's noise levels."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return DDIMSchedule(torch.cumprod(1.0 - betas, dim=0).to(device))


class RandomPrompts:
    """A stand-in for the text encoder: the same random embeddings whatever the prompt says."""

    def __init__(self, device: torch.device | str) -> None:
        generator = torch.Generator().manual_seed(0)
        texts = torch.randn(len(VIEW_NAMES) + 1, *TEXT_SHAPE, generator=generator).to(device)
        self.embeddings = PromptEmbeddings(texts[:-1], texts[-1])

    def encode(self, prompt: str, negative_prompt: str = "") -> PromptEmbeddings:
        return self.embeddings


def random_pipeline(config: ModelConfig, device: torch.device | str) -> Pipeline:
    """Such a model on `device`, with the denoiser and the encoder that `config` names."""
    device = torch.device(device)
    dtype = resolve_dtype(config.dtype, device)
    with quiet_libraries():  # diffusers has something to say about a change of dtype
        unet, vae = make_unet(device).to(dtype), make_vae(device).to(dtype)
    return assemble(config, sd_schedule(device), unet, vae, cast(Any, RandomPrompts(device)))
