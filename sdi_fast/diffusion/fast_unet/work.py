"""How much one call of the fast UNet computes: multiplications and additions, counted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .forward import SHALLOW_LEVELS
from .packing import Level, PackedUNet, Resample, Resnet, Transformer


@dataclass
class _Count:
    """Follows Forward; norms, activations and the text's projections are left out."""

    height: int
    width: int
    n_conditions: int
    n_tokens: int
    rows: int = 1  # of one latent: 1 until the text comes in
    flops: int = 0

    def add(self, *weights: Tensor) -> None:
        """Each applied once a pixel of what goes in (or comes out at the same size)."""
        pixels = self.height * self.width * self.rows
        self.flops += sum(2 * weight.numel() * pixels for weight in weights)

    def attention(self, width: int, n_keys: int) -> None:
        self.flops += 4 * self.height * self.width * self.rows * n_keys * width

    def resnet(self, r: Resnet) -> None:
        self.add(r.conv1, r.conv2, *r.shortcuts)

    def transformer(self, t: Transformer) -> None:
        self.add(t.proj_in)
        for block in t.blocks:
            width = block.out1.shape[0]
            self.add(block.qkv, block.out1)
            self.attention(width, self.height * self.width)
            self.rows = self.n_conditions
            self.add(block.query, block.out2, block.ff1, block.ff2)
            self.attention(width, self.n_tokens)
        self.add(t.proj_out)

    def resample(self, r: Resample | None) -> None:
        if r is None:
            return
        if r.stride == 2:
            self.height, self.width = self.height // 2, self.width // 2
        elif r.phases is not None:
            self.add(r.phases)
        if r.stride == 1:
            self.height, self.width = 2 * self.height, 2 * self.width
        if r.weight is not None and (r.stride == 2 or r.phases is None):
            self.add(r.weight)

    def level(self, level: Level, resample: bool = True) -> None:
        for i, resnet in enumerate(level.resnets):
            self.resnet(resnet)
            if i < len(level.transformers):
                self.transformer(level.transformers[i])
        if resample:
            self.resample(level.resample)


def call_flops(
    unet: PackedUNet,
    size: tuple[int, int],  # of the latents
    n_conditions: int,
    *,
    n_tokens: int = 77,
    shallow: bool = False,  # a call that is given its deep feature
) -> int:
    """FLOPs of one call for `n_conditions` of one latent."""
    count = _Count(*size, n_conditions, n_tokens)
    count.add(unet.conv_in)
    n = SHALLOW_LEVELS if shallow else len(unet.down)
    for i, level in enumerate(unet.down[:n]):
        count.level(level, resample=not shallow or i < n - 1)
    if shallow:
        count.height, count.width = (v // 2 ** (SHALLOW_LEVELS - 1) for v in size)
    else:
        count.level(unet.mid)
    count.rows = n_conditions
    for level in unet.up[-n:]:
        count.level(level)
    count.add(unet.conv_out)
    return count.flops
