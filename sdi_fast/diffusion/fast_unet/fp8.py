"""The linear layers of the transformer blocks in e4m3 ("fp8"), where their sizes allow it.

A block's six: merged q, k and v; both attentions' outputs; the cross-attention's q; the
feed-forward in and out. Not a transformer's two projections: they see all of the residual stream,
are a tenth of the linear layers' work, and with them a call was off by more (SD 2.1's size, random
weights: 6.0% rather than 1.8%; the bundled model at t = 250: 2.7% rather than 1.6%). Nor the text's
keys and values, which are computed once a prompt, nor the shortcuts of resnets. Convolutions, half
of the UNet's work, stay as they are: neither PyTorch nor cuDNN through it offers fp8 convolutions.

Each output channel has its own scale. e4m3 has 3 bits of mantissa, so a product of two rounded
factors is off by some 4% of the norm of its result: this is an approximation, never a rounding like
f16's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ...ops.rows8 import MULTIPLE, quantise_rows
from .packing import Block, Level, PackedUNet, Scales, Transformer


def quantise_weight(
    weight: Tensor,  # [K, N], a view of rows of K
) -> tuple[Tensor, Tensor]:
    """The same in e4m3, and a scale for every column, [1, N] f32."""
    values, scale = quantise_rows(weight.t(), backend="reference")
    return values.t(), scale.t()


def fits(block: Block) -> bool:
    """Whether its linear layers have sizes that torch._scaled_mm takes on a GPU."""
    weights = [getattr(block, field.name) for field in dataclasses.fields(Scales)]
    return all(size % MULTIPLE == 0 for weight in weights for size in weight.shape)


def _block(block: Block) -> Block:
    if not fits(block):
        return block
    weights: dict[str, Any] = {}
    scales: dict[str, Tensor] = {}
    for field in dataclasses.fields(Scales):
        weights[field.name], scales[field.name] = quantise_weight(getattr(block, field.name))
    return dataclasses.replace(block, scales=Scales(**scales), **weights)


def _transformer(transformer: Transformer) -> Transformer:
    return dataclasses.replace(transformer, blocks=tuple(map(_block, transformer.blocks)))


def _level(level: Level) -> Level:
    return dataclasses.replace(level, transformers=tuple(map(_transformer, level.transformers)))


def quantise_linears(unet: PackedUNet) -> PackedUNet:
    """`unet` with its transformer blocks' linear layers in e4m3; all else is shared with it."""
    return dataclasses.replace(
        unet,
        down=tuple(map(_level, unet.down)),
        mid=_level(unet.mid),
        up=tuple(map(_level, unet.up)),
    )
