"""Networks of Stable Diffusion 2.1-base's size with random weights (sdi_fast/bench/models.py)."""

from __future__ import annotations

from sdi_fast.bench.models import UNET, make_unet, make_vae, sd_schedule

__all__ = ["TFLOP_A_SAMPLE", "UNET", "make_unet", "make_vae", "sd_schedule"]

TFLOP_A_SAMPLE = 0.804  # one call, 64 x 64 latents, 77 tokens
