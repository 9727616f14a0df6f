"""The VAE encoder as a function on packed weights, with the gradient of the image only.

Activations are channels_last; a resnet keeps two of them for the backward (its input and what its
first convolution gave) and recomputes the rest inside of the group norm. Weights get no gradients.
The backward is written out, so that it can be captured in a graph of its own; its convolutions are
forward ones with flipped weights (methods.md C2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.group_norm_silu import group_norm_silu_bwd, group_norm_silu_fwd
from ..types import SDIFastError
from .vae_pack import Attention, Conv, Norm, PackedEncoder, Resnet

HALVES = (torch.float16, torch.bfloat16)
# Logits' gradients are about 1 / tokens of the others: f16 would lose them. A power of two.
LOGIT_GRAD_SCALE = 64.0

Step = Callable[[Tensor], Tensor]  # the output's gradient to the input's


def power_of_two_scale(
    grad: Tensor,
) -> Tensor:
    """The power of two that brings the largest entry of `grad` near 1, a f32 scalar; else 1.

    The loss is a mean over 16384 latents, so that gradients of about 6e-5 would underflow on their
    way through an f16 VAE (methods.md G11). A power of two changes no mantissa.
    """
    largest = grad.detach().abs().amax().float()
    usable = torch.isfinite(largest) & (largest > 0)
    factor = torch.exp2(-torch.log2(largest.clamp(min=1e-30)).round())
    return factor.masked_fill(~usable, 1.0)


class FastEncoder:
    """Forward with a tape, and backward along it.

    Args:
        packed: the weights.
        backend: of group norm, see ops/group_norm_silu.py.
    """

    def __init__(self, packed: PackedEncoder, backend: str = "auto") -> None:
        self.packed = packed
        self.backend = backend

    def check(
        self,
        x: Tensor,  # [B, 3, H, W]
    ) -> None:
        """Raises SDIFastError where the encoder cannot take images of this shape."""
        side = 2**self.packed.n_halvings
        if x.ndim != 4 or x.shape[1] != self.packed.in_channels:
            raise SDIFastError(
                f"images: expected [B, {self.packed.in_channels}, H, W], got {tuple(x.shape)}"
            )
        if x.shape[2] % side or x.shape[3] % side:
            raise SDIFastError(
                f"images: expected sides divisible by {side}, got {tuple(x.shape[2:])}"
            )

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,  # [B, 3, H, W] f32 or f64, in [-1, 1]
        with_tape: bool = True,
    ) -> tuple[Tensor, list[Step]]:
        """The posterior's mean and log variance side by side, [B, 2 C, h, w] in x's dtype.

        And the steps back, last first.
        """
        p = self.packed
        tape: list[Step] = []
        keep = tape.append if with_tape else lambda step: None
        h = torch.zeros(
            (len(x), p.conv_in.weight.shape[1], *x.shape[2:]), dtype=p.dtype, device=x.device
        ).contiguous(memory_format=torch.channels_last)
        h[:, : p.in_channels].copy_(x)
        h = self._conv(h, p.conv_in, keep)
        for i, layer in enumerate(p.layers):
            if isinstance(layer, Resnet):
                feeds_conv = i + 1 < len(p.layers) and isinstance(p.layers[i + 1], Conv)
                h = self._resnet(h, layer, feeds_conv, keep)
            elif isinstance(layer, Attention):
                h = self._attention(h, layer, keep)
            else:
                h = self._conv(h, layer, keep)
        h = self._norm(h, p.norm_out, keep)
        h = self._conv(h, p.conv_out, keep)
        out = h.to(x.dtype) + p.bias_out.to(x.dtype).view(1, -1, 1, 1)
        return out.contiguous(), tape[::-1]

    @torch.no_grad()
    def backward(
        self,
        grad: Tensor,  # [B, 2 C, h, w] f32 or f64
        tape: list[Step],
    ) -> Tensor:
        """The gradient of the images, [B, 3, H, W] in grad's dtype."""
        scale = power_of_two_scale(grad) if self.packed.dtype == torch.float16 else None
        g = grad if scale is None else grad * scale
        g = g.to(self.packed.dtype).contiguous(memory_format=torch.channels_last)
        for step in tape:
            g = step(g)
        g = g[:, : self.packed.in_channels].to(grad.dtype)
        return (g if scale is None else g / scale).contiguous()

    # ---- layers: the value, and the way back on the tape ----------------------------------------

    def _conv(self, x: Tensor, conv: Conv, keep: Callable[[Step], None]) -> Tensor:
        """Stride 1; or stride 2 on an x that is padded already, whose padding has no gradient."""

        def back(g: Tensor) -> Tensor:
            return _conv_grad(g, conv)

        keep(back)
        if conv.stride == 1:
            return F.conv2d(x, conv.weight, padding=1)
        return F.conv2d(x, conv.weight, stride=2)

    def _norm(self, x: Tensor, norm: Norm, keep: Callable[[Step], None]) -> Tensor:
        y, back = self._norm_of(x, norm)
        keep(lambda g: back(g, None))
        return y

    def _norm_of(
        self, x: Tensor, norm: Norm, silu: bool = True
    ) -> tuple[Tensor, Callable[[Tensor, Tensor | None], Tensor]]:
        """The value, and the way back, which takes the gradient of a shortcut along."""
        rows = _rows(x)
        y, statistics = group_norm_silu_fwd(
            rows, norm.shift, norm.weight, norm.bias, norm.n_groups, norm.eps, silu,
            backend=self.backend,
        )  # fmt: skip

        def back(g: Tensor, addend: Tensor | None) -> Tensor:
            grad = group_norm_silu_bwd(
                _rows(g), rows, norm.shift, norm.weight, norm.bias, statistics,
                None if addend is None else _rows(addend), silu, backend=self.backend,
            )  # fmt: skip
            return _image(grad, g)

        return _image(y, x), back

    def _resnet(
        self, x: Tensor, r: Resnet, feeds_conv: bool, keep: Callable[[Step], None]
    ) -> Tensor:
        y, back1 = self._norm_of(x, r.norm1)
        y, back2 = self._norm_of(F.conv2d(y, r.conv1.weight, padding=1), r.norm2)
        h = F.conv2d(y, r.conv2.weight, r.bias, padding=1)
        h = h.contiguous(memory_format=torch.channels_last)  # as it should be; written below

        def back(g: Tensor) -> Tensor:
            shortcut = g
            if r.shortcut is not None:
                shortcut = _image(_rows(g) @ r.shortcut, g)
            g = back2(_conv_grad(g, r.conv2), None)
            return back1(_conv_grad(g, r.conv1), shortcut)

        keep(back)
        if r.shortcut is not None:
            _rows(h).flatten(0, 1).addmm_(_rows(x).flatten(0, 1), r.shortcut.T)
            return _padded(h) if feeds_conv else h
        if not feeds_conv:
            return h.add_(x)
        return _padded(h, x)

    def _attention(self, x: Tensor, a: Attention, keep: Callable[[Step], None]) -> Tensor:
        """Written out: one head of 512 channels is more than fused attention kernels take well."""
        y, back_norm = self._norm_of(x, a.norm, silu=False)
        n, c = len(x), x.shape[1]
        rows = _rows(y).flatten(0, 1)  # [B N, C]
        qkv = torch.addmm(a.qkv_bias, rows, a.qkv.T).view(n, -1, 3 * c)
        q, k, v = qkv.split(c, dim=2)
        p = torch.softmax(_bmm_wide(q, k.transpose(1, 2)), dim=-1).to(x.dtype)
        o = torch.bmm(p, v)
        out = torch.addmm(a.out_bias, o.flatten(0, 1), a.out.T)

        def back(g: Tensor) -> Tensor:
            g_o = (_rows(g) @ a.out).contiguous()
            g_p = _bmm_wide(g_o, v.transpose(1, 2))
            along = (g_o.to(g_p.dtype) * o.to(g_p.dtype)).sum(-1, keepdim=True)
            scale = LOGIT_GRAD_SCALE if x.dtype == torch.float16 else 1.0
            g_s = g_p.sub_(along).mul_(p).mul_(scale).to(x.dtype)
            g_qkv = torch.empty_like(qkv)
            g_qkv[..., :c] = torch.bmm(g_s, k)
            g_qkv[..., c : 2 * c] = torch.bmm(g_s.transpose(1, 2), q)
            g_qkv[..., : 2 * c] /= scale
            g_qkv[..., 2 * c :] = torch.bmm(p.transpose(1, 2), g_o)
            return back_norm(_image(g_qkv @ a.qkv, g), g)

        keep(back)
        return _image(out.view(n, -1, c), x).add_(x)


def _conv_grad(g: Tensor, conv: Conv) -> Tensor:
    """The gradient of a convolution's input from that of its output."""
    if conv.flipped is not None:
        return F.conv2d(g, conv.flipped, padding=1)
    height, width = 2 * g.shape[2], 2 * g.shape[3]
    whole = F.conv_transpose2d(g, conv.weight, stride=2)  # with the padding's row and column
    return whole[:, :, :height, :width].contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W] channels_last as [B, H W, C], without a copy."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """[B, H W, C] as [B, C, H, W] channels_last, without a copy."""
    return rows.unflatten(1, tuple(like.shape[2:])).permute(0, 3, 1, 2)


def _padded(h: Tensor, x: Tensor | None = None) -> Tensor:
    """h (+ x) with a row of zeros below and a column at the right."""
    n, c, height, width = h.shape
    out: Any = torch.empty(
        (n, c, height + 1, width + 1), dtype=h.dtype, device=h.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    out[:, :, height:].zero_()
    out[:, :, :, width:].zero_()
    inner = out[:, :, :height, :width]
    if x is None:
        inner.copy_(h)
    else:
        torch.add(h, x, out=inner)
    return out


def _bmm_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in f32 where they are halves: logits of 30 in f16 would be off by 0.01."""
    if a.dtype not in HALVES:
        return torch.bmm(a, b)
    if not a.is_cuda:
        return torch.bmm(a.float(), b.float())
    return torch.bmm(a, b, out_dtype=torch.float32)
