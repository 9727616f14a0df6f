"""The fast UNet: packed once, prepared once a prompt, then called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops import rows8
from ...types import SDIFastError
from ..modules import cudnn_benchmark
from .choices import Choices, load_stored
from .forward import Forward
from .fp8 import quantise_linears
from .fp8_forward import Forward8
from .layers import Layers
from .options import FastUNetOptions
from .packing import pack


@dataclass(frozen=True)
class TextCache:
    """Keys and values of every cross-attention, at a fixed address that a graph may read."""

    projected: Tensor  # [K * B, T, columns]

    @property
    def n_rows(self) -> int:
        return int(self.projected.shape[0])

    def first(self, n: int) -> TextCache:
        """The first n rows, at the same address."""
        return TextCache(self.projected[:n])


class FastUNet:
    """A frozen UNet2DConditionModel as a function on packed weights, drop-in for Denoiser.

    Launching its kernels one by one takes longer than they run: see GraphedUNet.

    Args:
        unet: the diffusers model on its device; it is not kept, and may be freed.
        options: how to compute.
        dtype: of the packed weights and activations; None: the UNet's.

    Raises:
        SDIFastError: for a UNet with a feature that is not implemented, naming it, and for
            `linears` "fp8" on a GPU without such products.
    """

    kind = "fast"
    shares_latents = True  # predict takes K conditions of each latent

    def __init__(
        self,
        unet: Any,
        options: FastUNetOptions | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.options = options or FastUNetOptions()
        in_fp8 = self.linears == "fp8"
        if in_fp8:
            weight = next(unet.parameters())
            rows8.check_device(weight.device, dtype or weight.dtype)
        self.packed = pack(
            unet,
            dtype=dtype,
            upsample=self.options.upsample,
            n_train=self.options.n_train_steps,
            n_negative=self.options.n_negative_steps,
        )
        self.choices = Choices(load_stored(self.device) if self.options.stored else None)
        self.n_calls = 0
        if in_fp8:
            self.packed = quantise_linears(self.packed)
        forward = Forward8 if in_fp8 else Forward
        self._forward = forward(self.packed, Layers(self.options, self.choices))

    @property
    def linears(self) -> str:
        """How the transformer blocks' linear layers compute: "exact" or "fp8"."""
        return self.options.linears

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @torch.no_grad()
    def prepare(
        self,
        context: Tensor,  # [K * B, T, D]; row k * B + b is condition k of sample b
        cache: TextCache | None = None,
    ) -> TextCache:
        """The text's keys and values; into `cache` where given, so that a graph sees them.

        One matrix product for all layers, about 30 us at full size: nothing is remembered of the
        text that could go stale.
        """
        text = self.packed.text
        if context.ndim != 3 or context.shape[2] != text.shape[0]:
            raise SDIFastError(
                f"context: expected shape [*, *, {text.shape[0]}], got {list(context.shape)}"
            )
        m, n_tokens, width = context.shape
        flat = context.to(self.dtype).reshape(-1, width)
        if cache is None:
            return TextCache(torch.mm(flat, text).view(m, n_tokens, -1))
        if cache.projected.shape[:2] != (m, n_tokens):
            raise SDIFastError(
                f"context: expected {list(cache.projected.shape[:2])} rows and tokens as in the "
                f"cache, got {[m, n_tokens]}"
            )
        torch.mm(flat, text, out=cache.projected.view(m * n_tokens, -1))
        return cache

    @torch.no_grad()
    def predict_prepared(
        self,
        x: Tensor,  # [B, C, h, w] f32
        t: Tensor,  # [B] i64, in [-n_negative_steps, n_train_steps)
        cache: TextCache,
    ) -> Tensor:
        """The raw output, [K * B, C, h, w] f32: K conditions of each of the B latents.

        Host and device are never synchronised. A t outside of its range fails on the device.
        """
        return self._call(x, t, cache)[0]

    def predict_deep(
        self,
        x: Tensor,  # as in predict_prepared, and so on
        t: Tensor,
        cache: TextCache,
    ) -> tuple[Tensor, Tensor]:
        """The same, and the deep feature for predict_shallow, [K * B, H, W, C]."""
        out, deep = self._call(x, t, cache, None, True)
        assert deep is not None
        return out, deep

    def predict_shallow(
        self,
        x: Tensor,  # as in predict_prepared, and so on
        t: Tensor,
        cache: TextCache,
        deep: Tensor,  # [K * B, H, W, C], of predict_deep at a near time step
    ) -> Tensor:
        """An approximation of predict_prepared by the outermost levels alone."""
        if deep.shape[0] != cache.n_rows:
            raise SDIFastError(f"deep: expected {cache.n_rows} rows, got {deep.shape[0]}")
        return self._call(x, t, cache, deep)[0]

    @torch.no_grad()
    def _call(self, x: Tensor, t: Tensor, cache: TextCache, *deep: Any) -> Any:
        self.check(x, t, cache)
        self.n_calls += 1
        if not x.is_cuda:
            return self._forward(x, t, cache.projected, *deep)
        with torch.cuda.device(x.device), cudnn_benchmark(self.options.cudnn_benchmark_limit):
            return self._forward(x, t, cache.projected, *deep)

    def predict(
        self,
        x: Tensor,  # [B, C, h, w] f32
        t: Tensor,  # [B] i64; may be negative (methods.md G9)
        context: Tensor,  # [K * B, T, D]; row k * B + b is condition k of sample b
    ) -> Tensor:
        """The raw output (eps or v), [K * B, C, h, w] f32; with K = 1 as Denoiser.predict."""
        return self.predict_prepared(x, t, self.prepare(context))

    @torch.no_grad()
    def warm_up(
        self,
        x: Tensor,  # as in predict_prepared, and so on
        t: Tensor,
        cache: TextCache,
    ) -> None:
        """Makes the choices by measurement for these shapes and compiles what needs compiling."""
        if x.is_cuda:
            self.choices.start(x.device)
        try:
            self.predict_prepared(x, t, cache)
        finally:
            self.choices.stop()

    def check(self, x: Tensor, t: Tensor, cache: TextCache) -> None:
        """Raises SDIFastError where the shapes do not fit each other and the model."""
        unet = self.packed
        if x.ndim != 4 or x.shape[1] != unet.in_channels:
            raise SDIFastError(
                f"x: expected shape [*, {unet.in_channels}, *, *], got {list(x.shape)}"
            )
        step = 2 ** (unet.n_levels - 1)
        if x.shape[2] % step or x.shape[3] % step:
            raise SDIFastError(
                f"x: expected a height and width divisible by {step}, got {list(x.shape)}"
            )
        if t.shape != x.shape[:1]:
            raise SDIFastError(f"t: expected shape {[x.shape[0]]}, got {list(t.shape)}")
        if x.shape[0] == 0 or cache.n_rows % x.shape[0]:
            raise SDIFastError(
                f"context: expected a multiple of x's {x.shape[0]} rows, got {cache.n_rows}"
            )
