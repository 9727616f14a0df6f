"""The frozen UNet.

Embeddings and time steps arrive as tensors and nothing here waits for the device, so that a
captured graph can take this module's place.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..types import SDIFastError
from .fast_unet import FastUNet, FastUNetOptions, GraphedUNet

KINDS = ("diffusers", "fast", "auto")


class DenoiserLike(Protocol):
    """What guidance needs of a denoiser."""

    def predict(
        self,
        x: Tensor,  # [M, C, h, w] f32
        t: Tensor,  # [M] i64; may be negative (methods.md G9)
        context: Tensor,  # [M, T, D]
    ) -> Tensor:
        """The network's raw output (eps or v), [M, C, h, w] f32."""
        ...


class Denoiser:
    """A UNet2DConditionModel in eval mode, without gradients, counting its calls.

    Args:
        unet: the diffusers model, already on its device and in its dtype.
    """

    kind = "diffusers"
    linears = "exact"  # as FastUNet's

    def __init__(self, unet: Any) -> None:
        self.unet = unet.eval().requires_grad_(False)
        self.n_calls = 0

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,  # [M, C, h, w] f32 or f64
        t: Tensor,  # [M] i64; may be negative (methods.md G9)
        context: Tensor,  # [M, T, D]
    ) -> Tensor:
        """The UNet's raw output, [M, C, h, w] in x's dtype, f32 at least."""
        self.n_calls += 1
        dtype = self.dtype
        output = self.unet(
            x.to(dtype), t, encoder_hidden_states=context.to(dtype), return_dict=False
        )[0]
        return output.to(torch.promote_types(x.dtype, torch.float32))


AnyDenoiser = Denoiser | FastUNet | GraphedUNet


def make_denoiser(
    unet: Any,
    kind: str = "diffusers",
    options: FastUNetOptions | None = None,  # of the fast one
) -> AnyDenoiser:
    """A denoiser around a UNet2DConditionModel that is already on its device and in its dtype.

    Args:
        kind: "diffusers"; "fast", the model on packed weights, captured in graphs on a GPU; "auto",
            that on a GPU where it supports the model, otherwise diffusers'. With `linears` "fp8",
            which only the fast one has, "auto" means "fast".

    Raises:
        SDIFastError: where `kind` is "fast" and the model has a feature that it lacks, or the GPU
            lacks fp8.
    """
    return choose_denoiser(unet, kind, options)[0]


def choose_denoiser(
    unet: Any, kind: str = "diffusers", options: FastUNetOptions | None = None
) -> tuple[AnyDenoiser, str]:
    """`make_denoiser`, and why "auto" took diffusers' module: one line, "" where it did not."""
    if kind not in KINDS:
        raise SDIFastError(f"kind: expected {', '.join(KINDS)}, got {kind!r}")
    on_gpu = next(unet.parameters()).is_cuda
    if options is not None and options.linears == "fp8":
        if kind == "diffusers":
            raise SDIFastError('linears: fp8 needs the "fast" denoiser, got "diffusers"')
        kind = "fast"
    if kind == "diffusers":
        return Denoiser(unet), ""
    if kind == "auto" and not on_gpu:
        return Denoiser(unet), ""
    try:
        fast = FastUNet(unet, options)
    except SDIFastError as error:
        if kind == "fast":
            raise
        return Denoiser(unet), f"diffusers' UNet runs: {error}"
    return (GraphedUNet(fast) if on_gpu and fast.options.graphs else fast), ""
