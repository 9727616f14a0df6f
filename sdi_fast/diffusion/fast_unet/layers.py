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

from ...ops import rows8 as ops8
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
Candidates = dict[str, Callable[[], Tensor]]
MEASURED_SDPA = ("cudnn", "flash", "efficient")
MEASURED_SPLITS = (1, 16, 64)  # of group norms


def _key(kind: str, *tensors: Tensor) -> tuple[Any, ...]:
    return (kind, *(tuple(t.shape) for t in tensors), str(tensors[0].dtype))


class Layers:
    """The layers under one set of options."""

    def __init__(self, options: FastUNetOptions, choices: Choices) -> None:
        self.options, self.choices = options, choices
        self.backend = options.kernels

    def _may_choose(self, how: str) -> bool:
        """Whether an option's value leaves a choice among kernels to be recalled or measured."""
        if self.backend == "reference":
            return False
        return how == "measured" or (how == "auto" and self.choices.recalls)

    def group_norm(
        self,
        parts: Sequence[Tensor],  # [B, H, W, C_i]
        norm: Norm,
        shift: Tensor | None = None,  # [B, C], in place of the norm's own
        *,
        silu: bool = True,
    ) -> Tensor:  # [B, H, W, C]
        b, h, w, _ = parts[0].shape
        run = functools.partial(
            unet_ops.group_norm,
            [part.reshape(b, h * w, -1) for part in parts],
            norm.weight,
            norm.bias,
            norm.shift if shift is None else shift,
            n_groups=norm.n_groups,
            eps=norm.eps,
            silu=silu,
            backend=self.backend,
        )
        how = self.options.norms
        if not self._may_choose(how):
            return run().view(b, h, w, -1)
        candidates: Candidates = {"default": run}
        for splits in MEASURED_SPLITS:
            candidates[f"{splits} splits"] = functools.partial(run, splits=splits)
        key = (*_key("group_norm", *parts), silu)
        out = self.choices.pick(key, candidates, parts, measure=how == "measured")
        return out.view(b, h, w, -1)

    def layer_norm(self, x: Tensor, norm: Norm) -> Tensor:  # [M, C]
        return unet_ops.layer_norm(
            x, norm.weight, norm.bias, norm.shift, eps=norm.eps, backend=self.backend
        )

    def layer_norm8(self, x: Tensor, added: Tensor | None, norm: Norm) -> ops8.Rows8:
        """In e4m3; `added` is added to x in place first."""
        return ops8.layer_norm8(
            x, added, norm.weight, norm.bias, norm.shift, eps=norm.eps, backend=self.backend
        )

    def rows8(self, x: Tensor) -> ops8.Rows8:
        """In e4m3, [M, K]."""
        return ops8.quantise_rows(x, backend=self.backend)

    def geglu8(self, x: Tensor, bias: Tensor) -> ops8.Rows8:
        return ops8.geglu8(x, bias, backend=self.backend)

    def linear8(
        self, rows: ops8.Rows8, weight: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:  # [M, N]
        return ops8.linear8(*rows, weight, scale, dtype=dtype, backend=self.backend)

    def feed_forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """GEGLU of a linear map, [M, F]; weight is [K, 2 F], a view of rows of K."""

        def separate() -> Tensor:
            return unet_ops.geglu(torch.mm(x, weight), bias, backend=self.backend)

        def fused(tile: Any) -> Tensor:
            return unet_ops.linear_geglu(x, weight.t(), bias, tile=tile, backend=self.backend)

        how = self.options.geglu
        if how == "fused" and self.backend != "reference":
            return fused(unet_ops.linear_geglu_tiles(*x.shape)[0])
        # the copy engine feeds the fused kernel, which gains nothing without it
        if not (self._may_choose(how) and unet_ops.has_copy_engine()):
            return separate()
        tiles = unet_ops.linear_geglu_tiles(*x.shape)
        compiled = {str(tile): functools.partial(fused, tile) for tile in tiles}
        candidates: Candidates = {"separate": separate, **compiled}
        return self.choices.pick(
            _key("geglu", x, weight), candidates, [x], compiled, measure=how == "measured"
        )

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
