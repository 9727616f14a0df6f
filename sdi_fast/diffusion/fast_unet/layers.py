"""The layers of the fast UNet as functions: each picks its kernel and nothing else.

Activations are [B, H, W, C] contiguous; convolutions see them as channels_last [B, C, H, W].
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...ops import unet_ops
from .choices import Choices
from .options import FastUNetOptions
from .packing import Norm, Resample

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PADDED_BLOCK = 64  # conv3x3_padded takes channels in blocks of this many
Candidates = dict[str, Callable[[], Tensor]]
MEASURED_SDPA = ("cudnn", "flash", "efficient")


def _key(kind: str, *tensors: Tensor) -> tuple[Any, ...]:
    return (kind, *(tuple(t.shape) for t in tensors), str(tensors[0].dtype))


class Layers:
    """The layers under one set of options."""

    def __init__(self, options: FastUNetOptions, choices: Choices) -> None:
        self.options, self.choices = options, choices
        compiled = options.mode == "compile" and options.kernels == "auto"
        self.backend = "reference" if compiled else options.kernels
        # without choices among kernels
        self.plain = options.mode == "compile" or options.kernels == "reference"

    def group_norm(
        self,
        parts: Sequence[Tensor],  # [B, H, W, C_i]
        norm: Norm,
        shift: Tensor | None = None,  # [B, C], in place of the norm's own
        *,
        silu: bool = True,
        padded: bool = False,  # with a line and a column of zeros behind, for conv3x3_padded
    ) -> Tensor:  # [B, H, W, C], or [B, H + 1, W + 1, C]
        b, h, w, _ = parts[0].shape
        shape = (b, h + padded, w + padded, -1)
        run = functools.partial(
            unet_ops.group_norm,
            [part.reshape(b, h * w, -1) for part in parts],
            norm.weight,
            norm.bias,
            norm.shift if shift is None else shift,
            n_groups=norm.n_groups,
            eps=norm.eps,
            silu=silu,
            pad_width=w if padded else 0,
            backend=self.backend,
        )
        if self.options.norms == "measured" and not self.plain:
            candidates: Candidates = {"default": run}
            for splits in (1, 16, 64):
                candidates[f"{splits} splits"] = functools.partial(run, splits=splits)
            key = (*_key("group_norm", *parts), silu, padded)
            return self.choices.pick(key, candidates, parts).view(shape)
        return run().view(shape)

    def layer_norm(self, x: Tensor, norm: Norm) -> Tensor:  # [M, C]
        return unet_ops.layer_norm(
            x, norm.weight, norm.bias, norm.shift, eps=norm.eps, backend=self.backend
        )

    def feed_forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """GEGLU of a linear map, [M, F]; weight is [K, 2 F], a view of rows of K."""

        def separate() -> Tensor:
            return unet_ops.geglu(torch.mm(x, weight), bias, backend=self.backend)

        def fused(tile: Any) -> Tensor:
            return unet_ops.linear_geglu(x, weight.t(), bias, tile=tile, backend=self.backend)

        how = self.options.geglu
        if how == "separate" or self.plain:
            return separate()
        tiles = unet_ops.linear_geglu_tiles(*x.shape)
        if how == "fused":
            return fused(tiles[0])
        compiled = {str(tile): functools.partial(fused, tile) for tile in tiles}
        candidates: Candidates = {"separate": separate, **compiled}
        return self.choices.pick(_key("geglu", x, weight), candidates, [x], compiled)

    def attention(
        self,
        q: Tensor,  # [B, N, H, d]
        k: Tensor,  # [B, T, H, d]
        v: Tensor,  # [B, T, H, d]
    ) -> Tensor:  # [B * N, H * d]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))

        def run(backend: str) -> Tensor:
            chosen = SDPA.get(backend)
            with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
                out = F.scaled_dot_product_attention(q, k, v)
            # no copy where the backend lays its result out like q, as all but "math" do
            return out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])

        backend = self.options.attention
        if backend == "measured":
            names = MEASURED_SDPA if self.choices.timer else ("default", *MEASURED_SDPA)
            candidates = {name: functools.partial(run, name) for name in names}
            return self.choices.pick(_key("attention", q, k), candidates, [q, k, v])
        return run(backend)

    def conv(self, x: Tensor, weight: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        """[B, H, W, C] to [B, H', W', C'], without bias, by cuDNN."""
        out = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=padding)
        return out.permute(0, 2, 3, 1).contiguous()

    def norm_conv(
        self,
        parts: Sequence[Tensor],  # [B, H, W, C_i]
        norm: Norm,
        shift: Tensor | None,  # [B, C], in place of the norm's own
        weight: Tensor,  # [F, C, 3, 3] channels_last
        residual: Tensor | None = None,  # [B, H, W, F]
    ) -> Tensor:
        """conv(silu(group_norm)) + residual, [B, H, W, F], by whatever is chosen for the shape."""

        def library() -> Tensor:
            out = self.conv(self.group_norm(parts, norm, shift), weight)
            return out if residual is None else out.add_(residual)

        def pointers(tile: Any) -> Tensor:
            x = self.group_norm(parts, norm, shift)
            return unet_ops.conv3x3(x, filters, residual, tile=tile, backend=self.backend)

        def padded(tile: Any) -> Tensor:
            x = self.group_norm(parts, norm, shift, padded=True)
            return unet_ops.conv3x3_padded(x, filters, residual, tile=tile, backend=self.backend)

        how = self.options.conv
        f, c = weight.shape[:2]
        if how == "cudnn" or self.plain or (how == "padded" and c % PADDED_BLOCK):
            return library()
        filters = weight.permute(0, 2, 3, 1)
        b, h, w, _ = parts[0].shape
        if how == "triton":
            return pointers(unet_ops.conv3x3_tiles(b * h * w, f, c)[0])
        tiles = unet_ops.conv3x3_padded_tiles(b, h, w, f, c)
        if how == "padded":
            return padded(tiles[0])
        if tiles and unet_ops.has_copy_engine():
            compiled = {f"padded {tile}": functools.partial(padded, tile) for tile in tiles}
        else:
            tiles = unet_ops.conv3x3_tiles(b * h * w, f, c)
            compiled = {f"triton {tile}": functools.partial(pointers, tile) for tile in tiles}
        candidates: Candidates = {"library": library, **compiled}
        key = (*_key("conv", *parts, weight), residual is not None)
        return self.choices.pick(key, candidates, parts, compiled)

    def resample(self, x: Tensor, sampler: Resample) -> Tensor:
        x = x + sampler.shift  # before the zeros of the padding
        weight, phases = sampler.weight, sampler.phases
        if weight is not None and sampler.stride == 2:
            return self.conv(x, weight, stride=2)
        candidates: Candidates = {}
        if phases is not None:
            candidates["phase"] = functools.partial(self._upsample_phases, x, phases)
        if weight is not None:
            candidates["nearest"] = functools.partial(self._upsample_nearest, x, weight)
        return self.choices.pick(_key("upsample", x), candidates, [x])

    def _upsample_phases(self, x: Tensor, phases: Tensor) -> Tensor:
        return unet_ops.interleave_phases(self.conv(x, phases), backend=self.backend)

    def _upsample_nearest(self, x: Tensor, weight: Tensor) -> Tensor:
        b, h, w, c = x.shape
        tall = x[:, :, None, :, None].expand(b, h, 2, w, 2, c)
        return self.conv(tall.reshape(b, 2 * h, 2 * w, c), weight)
