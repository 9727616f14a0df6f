"""The forward pass with the transformer blocks' linear layers in e4m3.

torch._scaled_mm does not add to what is there: a product that belongs to the residual stream `h`
waits as `added`, and the layer norm that reads `h` next adds it. Layer norms and GEGLU write a
product's input in e4m3 themselves; after an attention, one pass casts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .forward import Forward, State
from .packing import Block, Scales, Transformer


class Forward8(Forward):
    """Runs packed weights of which transformer blocks may be in e4m3."""

    def _transformer(self, state: State, t: Transformer, text: Tensor) -> None:
        if t.blocks[0].scales is None:  # by the width, which all of them have
            super()._transformer(state, t, text)
            return
        normed = self.layers.group_norm([state.x], t.norm, silu=False)
        h = torch.mm(normed.view(-1, normed.shape[-1]), t.proj_in)
        added: Tensor | None = None
        for block in t.blocks:
            added = self._self_attention8(h, added, block, state.x.shape[0])
            if state.n_repeats > 1:
                h = h.add_(added).repeat(state.n_repeats, 1)
                added = None
                state.repeat()
            added = self._cross_attention8(h, added, block, text)
            added = self._feed_forward8(h, added, block)
        if added is not None:
            h.add_(added)
        state.x.view(h.shape[0], -1).addmm_(h, t.proj_out)

    def _self_attention8(self, h: Tensor, added: Tensor | None, block: Block, batch: int) -> Tensor:
        """What is to be added to h + added, which h then is; and so on."""
        scales = scales_of(block)
        rows = self.layers.layer_norm8(h, added, block.norm1)
        qkv = self.layers.linear8(rows, block.qkv, scales.qkv, h.dtype)
        qkv = qkv.view(batch, -1, 3, block.heads, h.shape[1] // block.heads)
        rows = self.layers.rows8(self.layers.attention(*qkv.unbind(2)))
        return self.layers.linear8(rows, block.out1, scales.out1, h.dtype)

    def _cross_attention8(
        self, h: Tensor, added: Tensor | None, block: Block, text: Tensor
    ) -> Tensor:
        scales = scales_of(block)
        rows = self.layers.layer_norm8(h, added, block.norm2)
        q = self.layers.linear8(rows, block.query, scales.query, h.dtype)
        q = q.view(text.shape[0], -1, block.text_heads, q.shape[1] // block.text_heads)
        kv = text[..., block.text].unflatten(-1, (2, block.text_heads, q.shape[-1]))
        rows = self.layers.rows8(self.layers.attention(q, *kv.unbind(2)))
        return self.layers.linear8(rows, block.out2, scales.out2, h.dtype)

    def _feed_forward8(self, h: Tensor, added: Tensor, block: Block) -> Tensor:
        scales = scales_of(block)
        rows = self.layers.layer_norm8(h, added, block.norm3)
        wide = self.layers.linear8(rows, block.ff1, scales.ff1, h.dtype)
        rows = self.layers.geglu8(wide, block.ff1_bias)
        return self.layers.linear8(rows, block.ff2, scales.ff2, h.dtype)


def scales_of(block: Block) -> Scales:
    assert block.scales is not None  # fp8.py: all of a transformer's blocks, or none
    return block.scales
