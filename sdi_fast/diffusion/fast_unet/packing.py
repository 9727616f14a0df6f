"""A diffusers UNet's weights in the layout that the fast forward wants, all constants folded.

Activations travel without the biases of the layers that made them: a bias that nothing but a
constant shift of a channel can come of is carried along as `shift` [C] f32 while packing, and is
added where the next norm reads the activation, for nothing. Linear maps fold it into their own.
Only a 3 x 3 convolution with zero padding needs it added before (`Resample.shift`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .support import check_supported


@dataclass(frozen=True)
class Norm:
    """Of a group norm (with shift [1, C]) or layer norm (with shift [C])."""

    weight: Tensor  # [C] f32
    bias: Tensor  # [C] f32
    shift: Tensor | None  # [1, C] or [C] f32
    eps: float
    n_groups: int = 0


@dataclass(frozen=True)
class Resnet:
    norm1: Norm
    conv1: Tensor  # [C_out, C_in, 3, 3] channels_last
    time: slice  # columns of the table of time shifts: conv1's bias and the time embedding
    norm2: Norm
    conv2: Tensor
    shortcuts: tuple[Tensor, ...]  # [C_i, C_out] of each input part; () for the identity


@dataclass(frozen=True)
class Scales:
    """Of a block's weights in e4m3, one an output channel: w = values scale, [1, N] f32 each."""

    qkv: Tensor
    out1: Tensor
    query: Tensor
    out2: Tensor
    ff1: Tensor
    ff2: Tensor


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    norm1: Norm
    qkv: Tensor  # [C, 3 C]
    out1: Tensor  # [C, C]
    norm2: Norm
    query: Tensor  # [C, C]
    text: slice  # columns of the text projections: keys, then values
    out2: Tensor  # [C, C]
    norm3: Norm
    ff1: Tensor  # [C, 8 C]
    ff1_bias: Tensor  # [8 C] f32
    ff2: Tensor  # [4 C, C]
    heads: int
    text_heads: int
    scales: Scales | None = None  # where its weights are e4m3 (fp8.py)


@dataclass(frozen=True)
class Transformer:
    norm: Norm
    proj_in: Tensor  # [C, C]
    blocks: tuple[Block, ...]
    proj_out: Tensor  # [C, C]


@dataclass(frozen=True)
class Resample:
    """A convolution that halves or doubles the size."""

    shift: Tensor  # [C_in] in the module's dtype: still to be added to the input
    stride: int
    weight: Tensor | None  # [C_out, C_in, 3, 3] channels_last
    phases: Tensor | None  # [4 C_out, C_in, 2, 2] channels_last: see phase_weights


@dataclass(frozen=True)
class Level:
    resnets: tuple[Resnet, ...]
    transformers: tuple[Transformer, ...]  # () or one a resnet (one less in the middle)
    resample: Resample | None


@dataclass(frozen=True)
class PackedUNet:
    in_channels: int
    out_channels: int
    conv_in: Tensor  # [C, padded in_channels, 3, 3]
    down: tuple[Level, ...]
    mid: Level
    up: tuple[Level, ...]
    norm_out: Norm
    conv_out: Tensor  # [padded out_channels, C, 3, 3]
    conv_out_bias: Tensor  # [1, out_channels, 1, 1] f32
    time_table: Tensor  # [n_negative + n_train, sum of C_out]
    n_negative: int
    text: Tensor  # [D, columns]: all keys' and values' projections
    n_levels: int

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.device


Shift = Tensor  # [C] f32


def _value(parameter: Any, like: Tensor) -> Tensor:
    """A parameter in f32, or zeros where the layer has none."""
    if parameter is None:
        return torch.zeros(like.shape[0], device=like.device)
    return parameter.detach().float()


def _pad(weight: Tensor, dim: int, multiple: int) -> Tensor:
    """Zeros up to a multiple of `multiple`: tensor cores take channels in eights."""
    missing = -weight.shape[dim] % multiple
    shape = list(weight.shape)
    shape[dim] = missing
    return torch.cat([weight, weight.new_zeros(shape)], dim=dim) if missing else weight


def phase_weights(weight: Tensor) -> Tensor:
    """[4 C, C_in, 2, 2] of a 3 x 3 kernel on an image doubled by nearest neighbour.

    Output pixel (2 i + a, 2 j + b) sees 2 x 2 pixels of the small image, from i + a - 1 and
    j + b - 1 on; taps that fall on the same pixel are summed.
    """
    w = weight.float()
    rows = [(w[:, :, :1], w[:, :, 1:].sum(2, True)), (w[:, :, :2].sum(2, True), w[:, :, 2:])]
    phases = []
    for a in (0, 1):
        tall = torch.cat(rows[a], dim=2)  # [C, C_in, 2, 3]
        phases.append(torch.cat([tall[..., :1], tall[..., 1:].sum(3, True)], dim=3))
        phases.append(torch.cat([tall[..., :2].sum(3, True), tall[..., 2:]], dim=3))
    return torch.cat(phases).to(weight.dtype)


class Packer:
    """Walks the UNet once, in the order of its forward pass."""

    def __init__(self, unet: Any, dtype: torch.dtype, upsample: str, multiple: int) -> None:
        self.unet, self.dtype, self.upsample, self.multiple = unet, dtype, upsample, multiple
        self.time_projections: list[tuple[Tensor, Tensor]] = []  # weight, bias of each resnet
        self.text_projections: list[Tensor] = []
        self.n_time = self.n_text = 0

    def conv(self, weight: Tensor) -> Tensor:
        cast = weight.detach().to(self.dtype)
        return cast.contiguous(memory_format=torch.channels_last)

    def linear(self, *weights: Tensor) -> Tensor:
        """[in, out], a view of the rows that torch.nn.Linear keeps; 1 x 1 convolutions too."""
        flat = [w.detach().reshape(w.shape[0], -1).to(self.dtype) for w in weights]
        return torch.cat(flat).contiguous().t()

    def norm(self, norm: Any, shift: Shift | None) -> Norm:
        groups = getattr(norm, "num_groups", 0)
        weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
        if shift is not None:
            shift = shift[None].contiguous() if groups else shift.contiguous()
        return Norm(weight.contiguous(), bias.contiguous(), shift, float(norm.eps), groups)

    def resnet(self, r: Any, shifts: Sequence[Shift]) -> tuple[Resnet, Shift]:
        """`shifts`: of the input's parts."""
        shift_in = torch.cat(list(shifts))
        start, width = self.n_time, r.conv1.out_channels
        self.n_time += width
        bias = _value(r.conv1.bias, r.conv1.weight) + _value(
            r.time_emb_proj.bias, r.time_emb_proj.weight
        )
        self.time_projections.append((r.time_emb_proj.weight.detach().float(), bias))
        shift = _value(r.conv2.bias, r.conv2.weight)
        shortcuts: tuple[Tensor, ...] = ()
        if r.conv_shortcut is not None:
            weight = r.conv_shortcut.weight.detach().flatten(1)
            shift = shift + weight.float() @ shift_in + _value(r.conv_shortcut.bias, weight)
            pieces = weight.split([s.shape[0] for s in shifts], dim=1)
            shortcuts = tuple(self.linear(piece) for piece in pieces)
        else:
            shift = shift + shift_in
        packed = Resnet(
            norm1=self.norm(r.norm1, shift_in),
            conv1=self.conv(r.conv1.weight),
            time=slice(start, self.n_time),
            norm2=self.norm(r.norm2, None),
            conv2=self.conv(r.conv2.weight),
            shortcuts=shortcuts,
        )
        return packed, shift

    def block(self, b: Any, shift: Shift) -> tuple[Block, Shift]:
        norm1 = self.norm(b.norm1, shift)
        shift = shift + _value(b.attn1.to_out[0].bias, b.attn1.to_out[0].weight)
        norm2 = self.norm(b.norm2, shift)
        shift = shift + _value(b.attn2.to_out[0].bias, b.attn2.to_out[0].weight)
        norm3 = self.norm(b.norm3, shift)
        ff1, ff2 = b.ff.net[0].proj, b.ff.net[2]
        shift = shift + _value(ff2.bias, ff2.weight)
        start = self.n_text
        self.text_projections += [b.attn2.to_k.weight.detach(), b.attn2.to_v.weight.detach()]
        self.n_text += b.attn2.to_k.out_features + b.attn2.to_v.out_features
        packed = Block(
            norm1=norm1,
            qkv=self.linear(b.attn1.to_q.weight, b.attn1.to_k.weight, b.attn1.to_v.weight),
            out1=self.linear(b.attn1.to_out[0].weight),
            norm2=norm2,
            query=self.linear(b.attn2.to_q.weight),
            text=slice(start, self.n_text),
            out2=self.linear(b.attn2.to_out[0].weight),
            norm3=norm3,
            ff1=self.linear(ff1.weight),
            ff1_bias=_value(ff1.bias, ff1.weight).contiguous(),
            ff2=self.linear(ff2.weight),
            heads=int(b.attn1.heads),
            text_heads=int(b.attn2.heads),
        )
        return packed, shift

    def transformer(self, t: Any, shift: Shift) -> tuple[Transformer, Shift]:
        norm = self.norm(t.norm, shift)
        inner = _value(t.proj_in.bias, t.proj_in.weight)
        blocks = []
        for block in t.transformer_blocks:
            packed, inner = self.block(block, inner)
            blocks.append(packed)
        weight = t.proj_out.weight.detach().reshape(t.proj_out.weight.shape[0], -1)
        out_shift = shift + _value(t.proj_out.bias, weight) + weight.float() @ inner
        proj_in, proj_out = self.linear(t.proj_in.weight), self.linear(weight)
        return Transformer(norm, proj_in, tuple(blocks), proj_out), out_shift

    def resample(self, sampler: Any, shift: Shift, stride: int) -> tuple[Resample, Shift]:
        weight, bias = sampler.conv.weight, sampler.conv.bias
        plain = stride == 2 or self.upsample in ("nearest", "measured")
        phases = stride == 1 and self.upsample in ("phase", "measured")
        packed = Resample(
            shift=shift.to(self.dtype),
            stride=stride,
            weight=self.conv(weight) if plain else None,
            phases=self.conv(phase_weights(weight.detach())) if phases else None,
        )
        return packed, _value(bias, weight)

    def down(self, shift: Shift) -> tuple[tuple[Level, ...], list[Shift], Shift]:
        """Levels, the skip connections' shifts, the last one's shift."""
        levels, stack = [], [shift]
        for block in self.unet.down_blocks:
            resnets, transformers, resample = [], [], None
            for i, resnet in enumerate(block.resnets):
                packed, shift = self.resnet(resnet, [shift])
                resnets.append(packed)
                if hasattr(block, "attentions"):
                    attention, shift = self.transformer(block.attentions[i], shift)
                    transformers.append(attention)
                stack.append(shift)
            if block.downsamplers is not None:
                resample, shift = self.resample(block.downsamplers[0], shift, 2)
                stack.append(shift)
            levels.append(Level(tuple(resnets), tuple(transformers), resample))
        return tuple(levels), stack, shift

    def mid(self, shift: Shift) -> tuple[Level, Shift]:
        block = self.unet.mid_block
        first, shift = self.resnet(block.resnets[0], [shift])
        resnets, transformers = [first], []
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            packed, shift = self.transformer(attention, shift)
            transformers.append(packed)
            following, shift = self.resnet(resnet, [shift])
            resnets.append(following)
        return Level(tuple(resnets), tuple(transformers), None), shift

    def up(self, stack: list[Shift], shift: Shift) -> tuple[tuple[Level, ...], Shift]:
        levels = []
        for block in self.unet.up_blocks:
            resnets, transformers, resample = [], [], None
            for i, resnet in enumerate(block.resnets):
                packed, shift = self.resnet(resnet, [shift, stack.pop()])
                resnets.append(packed)
                if hasattr(block, "attentions"):
                    attention, shift = self.transformer(block.attentions[i], shift)
                    transformers.append(attention)
            if block.upsamplers is not None:
                resample, shift = self.resample(block.upsamplers[0], shift, 1)
            levels.append(Level(tuple(resnets), tuple(transformers), resample))
        return tuple(levels), shift

    def time_table(self, n_train: int, n_negative: int) -> Tensor:
        """What each resnet adds after conv1 at the time steps from -n_negative on, in f32 sums."""
        unet, device = self.unet, self.unet.conv_in.weight.device
        steps = torch.arange(-n_negative, n_train, device=device)
        embedding = unet.time_proj(steps).float()
        first, second = unet.time_embedding.linear_1, unet.time_embedding.linear_2
        hidden = torch.nn.functional.silu(
            embedding @ first.weight.detach().float().t() + _value(first.bias, first.weight)
        )
        hidden = hidden @ second.weight.detach().float().t() + _value(second.bias, second.weight)
        hidden = torch.nn.functional.silu(hidden)
        columns = [(hidden @ w.t() + b).to(self.dtype) for w, b in self.time_projections]
        return torch.cat(columns, dim=1).contiguous()


@torch.no_grad()
def pack(
    unet: Any,
    *,
    dtype: torch.dtype | None = None,  # None: the UNet's
    upsample: str = "phase",
    n_train: int = 1000,
    n_negative: int = 100,
    multiple: int | None = None,  # of the latent's channels, padded; None: 8 on a GPU, else 1
) -> PackedUNet:
    """Packs a UNet2DConditionModel; its own weights are left as they are.

    Raises:
        SDIFastError: for a UNet with a feature that is not implemented, naming it.
    """
    check_supported(unet)
    weight = unet.conv_in.weight
    dtype = dtype or weight.dtype
    packer = Packer(unet, dtype, upsample, multiple or (8 if weight.is_cuda else 1))
    down, stack, shift = packer.down(_value(unet.conv_in.bias, weight))
    mid, shift = packer.mid(shift)
    up, shift = packer.up(stack, shift)
    out = unet.conv_out
    return PackedUNet(
        in_channels=int(weight.shape[1]),
        out_channels=int(out.weight.shape[0]),
        conv_in=packer.conv(_pad(weight.detach(), 1, packer.multiple)),
        down=down,
        mid=mid,
        up=up,
        norm_out=packer.norm(unet.conv_norm_out, shift),
        conv_out=packer.conv(_pad(out.weight.detach(), 0, packer.multiple)),
        conv_out_bias=_value(out.bias, out.weight).view(1, -1, 1, 1),
        time_table=packer.time_table(n_train, n_negative),
        n_negative=n_negative,
        text=packer.linear(*packer.text_projections),
        n_levels=len(down),
    )
