"""The frozen VAE: images to latents with a gradient, latents to images for display.

Images are [B, 3, H, W] f32 in [0, 1], latents [B, C, h, w] f32, already scaled for the UNet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import SDIFastError
from .encoder_graph import EncoderGraphs
from .fast_encoder import FastEncoder, power_of_two_scale
from .schedule import draw_normal
from .vae_pack import pack_encoder

KINDS = ("diffusers", "fast", "auto")

LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clamps the posterior's log variance so


class _ScaleGradient(torch.autograd.Function):
    """Identity whose backward multiplies the gradient by a power of two that brings its largest
    entry near 1, and leaves that factor in `scale` for _UnscaleGradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.scale.copy_(power_of_two_scale(grad))
        return grad * ctx.scale, None


class _UnscaleGradient(torch.autograd.Function):
    """Identity whose backward divides the gradient by what _ScaleGradient multiplied it by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.scale, None


class LatentEncoder:
    """An AutoencoderKL in eval mode with frozen weights.

    Args:
        vae: the diffusers model, already on its device and in its dtype.
        image_size: side of the images that it is given, pixels.
        kind: who encodes: "diffusers"; "fast", the model on packed weights, on a GPU in graphs;
            "auto", that on a GPU where it supports the model, otherwise diffusers.

    Raises:
        SDIFastError: where `kind` is "fast" and the model has a feature that it lacks.
    """

    def __init__(self, vae: Any, image_size: int, kind: str = "diffusers") -> None:
        self.vae = vae.eval().requires_grad_(False)
        # note: why "auto" took diffusers' encoder, one line; "" where it did not
        self.fast, self.note = _make_fast(self.vae, image_size, kind)
        self.kind = "diffusers" if self.fast is None else "fast"
        self.image_size = image_size
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(getattr(vae.config, "shift_factor", None) or 0.0)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def encode(
        self,
        images: Tensor,  # [B, 3, H, W] f32, in [0, 1]
        generator: torch.Generator | None = None,
        sample: bool = True,
        *,
        noise: Tensor | None = None,  # [B, C, h, w]
        graphed: bool = True,
    ) -> Tensor:
        """Latents [B, C, h, w] in the images' dtype, with a gradient to `images` (methods.md C2).

        Args:
            generator: draws the posterior's noise; needed where `sample`, without `noise`.
            sample: a draw from the posterior, or its mode.
            noise: the posterior's noise.
            graphed: whether the fast encoder on a GPU runs as its own CUDA graphs; not for callers
                that capture the call.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise SDIFastError(f"images: expected [B, 3, H, W], got {tuple(images.shape)}")
        if sample and generator is None and noise is None:
            raise SDIFastError("generator: expected a torch.Generator to sample with, got None")
        size = (self.image_size, self.image_size)
        x = images
        if tuple(images.shape[-2:]) != size:
            x = F.interpolate(images, size, mode="bilinear", align_corners=False)
        mean, std = self._posterior(2.0 * x - 1.0, graphed)
        latents = mean
        if sample:
            if noise is None:
                assert generator is not None
                noise = draw_normal(mean.shape, generator, mean)
            latents = mean + std * noise
        return (latents - self.shift_factor) * self.scaling_factor

    def _posterior(
        self,
        x: Tensor,  # [B, 3, S, S] f32, in [-1, 1]
        graphed: bool,
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [B, C, h, w] in x's dtype, not scaled."""
        parameters = self._parameters(x) if self.fast is None else self.fast(x, graphed)
        mean, logvar = parameters.chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))

    def _parameters(self, x: Tensor) -> Tensor:
        """What diffusers' encoder gives for x, [B, 2 C, h, w] in x's dtype."""
        scale = torch.ones((), device=x.device, dtype=torch.float32)
        guarded = self.dtype == torch.float16
        if guarded:
            x = _UnscaleGradient.apply(x, scale)
        parameters = self.vae.encode(x.to(self.dtype)).latent_dist.parameters.to(x.dtype)
        if guarded:
            parameters = _ScaleGradient.apply(parameters, scale)
        return parameters

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,  # [B, C, h, w] f32
    ) -> Tensor:
        """Images [B, 3, H, W] f32, clamped to [0, 1], for display."""
        z = latents / self.scaling_factor + self.shift_factor
        images = self.vae.decode(z.to(self.dtype)).sample.float()
        return (images * 0.5 + 0.5).clamp(0.0, 1.0)


def _make_fast(vae: Any, image_size: int, kind: str) -> tuple[EncoderGraphs | None, str]:
    if kind not in KINDS:
        raise SDIFastError(f"kind: expected {', '.join(KINDS)}, got {kind!r}")
    on_gpu = next(vae.parameters()).is_cuda
    if kind == "diffusers":
        return None, ""
    if kind == "auto" and not on_gpu:
        return None, ""
    try:
        packed = pack_encoder(vae)
        if image_size % 2**packed.n_halvings:
            raise SDIFastError(
                f"vae: expected a side divisible by {2**packed.n_halvings}, got {image_size}"
            )
    except SDIFastError as error:
        if kind == "fast":
            raise
        return None, f"diffusers' encoder runs: {error}"
    return EncoderGraphs(FastEncoder(packed), capture=on_gpu), ""
