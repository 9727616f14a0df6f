"""The UNet's forward pass on packed weights.

Whatever does not see the text (conv_in, the first resnets, the first self-attention) is computed
once for the K conditions that share a latent, and repeated: row k B + b is condition k of sample b.
Buffers are updated in place only where nothing else reads them later: see the comments.

What enters the last SHALLOW_LEVELS levels of the way up is the deep feature. A caller may keep it
and give it back at a later, near time step, where only these levels and their counterparts of the
way down run then (DeepCache, arXiv 2312.00858).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layers import Layers
from .packing import Block, Level, PackedUNet, Resnet, Transformer

# The largest images only: their skip connections are computed anew, and hold what changes most from
# one step to the next. On SD 2.1 they are 37% of a call's work; two levels would be 67%, and leave
# little to save.
SHALLOW_LEVELS = 1


@dataclass
class State:
    """What travels through the network."""

    x: Tensor  # [M, H, W, C]
    shifts: Tensor  # [M, columns of the time table]
    skips: list[Tensor] = field(default_factory=list)
    n_repeats: int = 1  # conditions that still share their rows

    def repeat(self) -> None:
        """From here on each condition has its own rows."""
        if self.n_repeats > 1:
            self.x = _repeat(self.x, self.n_repeats)
            self.shifts = _repeat(self.shifts, self.n_repeats)
            self.skips = [_repeat(skip, self.n_repeats) for skip in self.skips]
            self.n_repeats = 1


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *(1 for _ in x.shape[1:]))


class Forward:
    """Runs packed weights."""

    def __init__(self, unet: PackedUNet, layers: Layers) -> None:
        self.unet, self.layers = unet, layers

    def __call__(
        self,
        x: Tensor,  # [B, C, h, w] f32
        t: Tensor,  # [B] i64
        text: Tensor,  # [K * B, T, columns of unet.text]
        deep: Tensor | None = None,  # [K * B, H, W, C], not changed
        keep_deep: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The network's output, [K * B, C, h, w] f32, and the deep feature where to be kept.

        Where `deep` is given, the levels that it comes from are left out.
        """
        unet = self.unet
        shifts = torch.nn.functional.embedding(t + unet.n_negative, unet.time_table)
        state = State(self._enter(x), shifts, n_repeats=text.shape[0] // x.shape[0])
        state.skips.append(state.x)
        if deep is None:
            self._deep(state, text)
        else:
            *outer, last = unet.down[:SHALLOW_LEVELS]
            for level in outer:
                self._down(state, level, text)
            self._down(state, dataclasses.replace(last, resample=None), text)
            state.repeat()
            state.x = deep
        kept = state.x if keep_deep else None  # the levels that follow only read it
        for level in unet.up[-SHALLOW_LEVELS:]:
            self._up(state, level, text)
        state.repeat()
        normed = self.layers.group_norm([state.x], unet.norm_out)
        out = self.layers.conv(normed, unet.conv_out).permute(0, 3, 1, 2)
        return (unet.conv_out_bias + out[:, : unet.out_channels]).contiguous(), kept

    def _deep(self, state: State, text: Tensor) -> None:
        """All of the way down and the way up to the shallow levels; ends with each condition's
        own rows, since the middle sees the text."""
        for level in self.unet.down:
            self._down(state, level, text)
        mid = self.unet.mid
        self._resnet(state, mid.resnets[0])
        for transformer, resnet in zip(mid.transformers, mid.resnets[1:], strict=True):
            self._transformer(state, transformer, text)
            self._resnet(state, resnet)
        for level in self.unet.up[:-SHALLOW_LEVELS]:
            self._up(state, level, text)

    def _enter(self, x: Tensor) -> Tensor:
        unet = self.unet
        b, c, h, w = x.shape
        image = x.new_zeros((b, h, w, unet.conv_in.shape[1]), dtype=unet.dtype)
        image[..., :c] = x.permute(0, 2, 3, 1)
        return self.layers.conv(image, unet.conv_in)

    def _down(self, state: State, level: Level, text: Tensor) -> None:
        for i, resnet in enumerate(level.resnets):
            self._resnet(state, resnet)
            if level.transformers:
                self._transformer(state, level.transformers[i], text)
            state.skips.append(state.x)
        if level.resample is not None:
            state.x = self.layers.resample(state.x, level.resample)
            state.skips.append(state.x)

    def _up(self, state: State, level: Level, text: Tensor) -> None:
        for i, resnet in enumerate(level.resnets):
            self._resnet(state, resnet, state.skips.pop())
            if level.transformers:
                self._transformer(state, level.transformers[i], text)
        if level.resample is not None:
            state.x = self.layers.resample(state.x, level.resample)

    def _resnet(self, state: State, r: Resnet, skip: Tensor | None = None) -> None:
        layers = self.layers
        parts = [state.x] if skip is None else [state.x, skip]
        h = layers.conv(layers.group_norm(parts, r.norm1), r.conv1)
        h = layers.conv(layers.group_norm([h], r.norm2, state.shifts[:, r.time]), r.conv2)
        # h is this function's own: the residual is added into it
        if r.shortcuts:
            flat = h.view(-1, h.shape[-1])
            for part, weight in zip(parts, r.shortcuts, strict=True):
                flat.addmm_(part.reshape(-1, part.shape[-1]), weight)
        else:
            h.add_(state.x)
        state.x = h

    def _transformer(self, state: State, t: Transformer, text: Tensor) -> None:
        """state.x is a resnet's output, which is no skip connection: it is updated in place."""
        normed = self.layers.group_norm([state.x], t.norm, silu=False)
        h = torch.mm(normed.view(-1, normed.shape[-1]), t.proj_in)
        for block in t.blocks:
            self._self_attention(h, block, state.x.shape[0])
            if state.n_repeats > 1:
                h = h.repeat(state.n_repeats, 1)
                state.repeat()
            self._cross_attention(h, block, text)
            normed = self.layers.layer_norm(h, block.norm3)
            gated = self.layers.feed_forward(normed, block.ff1, block.ff1_bias)
            h.addmm_(gated, block.ff2)
        state.x.view(h.shape[0], -1).addmm_(h, t.proj_out)

    def _self_attention(self, h: Tensor, block: Block, batch: int) -> None:
        normed = self.layers.layer_norm(h, block.norm1)
        qkv = torch.mm(normed, block.qkv).view(batch, -1, 3, block.heads, h.shape[1] // block.heads)
        h.addmm_(self.layers.attention(*qkv.unbind(2)), block.out1)

    def _cross_attention(self, h: Tensor, block: Block, text: Tensor) -> None:
        normed = self.layers.layer_norm(h, block.norm2)
        q = torch.mm(normed, block.query)
        q = q.view(text.shape[0], -1, block.text_heads, q.shape[1] // block.text_heads)
        kv = text[..., block.text].unflatten(-1, (2, block.text_heads, q.shape[-1]))
        h.addmm_(self.layers.attention(q, *kv.unbind(2)), block.out2)
