"""The Stable Diffusion UNet without autograd: constants folded, kernels fused, capturable."""

from __future__ import annotations

from .graph import CapturedUNet, GraphedUNet
from .model import FastUNet, TextCache
from .options import FastUNetOptions

__all__ = ["CapturedUNet", "FastUNet", "FastUNetOptions", "GraphedUNet", "TextCache"]
