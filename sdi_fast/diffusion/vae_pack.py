"""The VAE encoder's weights, packed for fast_encoder.py; which VAEs that can serve.

Biases are left out of the convolutions: where a bias is the same for all pixels, what follows can
take it along. Every layer below knows the `shift` [C] that is missing in its input and was made by
biases before it: group norm adds it as it reads, a 1 x 1 convolution maps it to another shift, and
a downsampler, whose zero padding must not be shifted, gets an input that misses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..types import SDIFastError
from .modules import PROCESSORS, alteration

CHANNEL_MULTIPLE = 8  # of f16 and bf16 convolutions on tensor cores


@dataclass(frozen=True)
class Norm:
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    n_groups: int
    eps: float
    shift: Tensor | None  # [C], missing in the input


@dataclass(frozen=True)
class Conv:
    """3 x 3 without bias; padding 1, or stride 2 on an input padded below and at the right."""

    weight: Tensor  # [O, I, 3, 3] channels_last
    flipped: Tensor | None  # [I, O, 3, 3] channels_last: the input's gradient as a convolution

    @property
    def stride(self) -> int:
        return 2 if self.flipped is None else 1


@dataclass(frozen=True)
class Resnet:
    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    shortcut: Tensor | None  # [O, I]
    bias: Tensor | None  # [O]: what the output would miss, where the next layer wants it all


@dataclass(frozen=True)
class Attention:
    norm: Norm
    qkv: Tensor  # [3 C, C], the scale of the logits in q
    qkv_bias: Tensor  # [3 C]
    out: Tensor  # [C, C]
    out_bias: Tensor  # [C]


Layer = Resnet | Attention | Conv  # the last: a downsampler


@dataclass(frozen=True)
class PackedEncoder:
    conv_in: Conv
    layers: tuple[Layer, ...]
    norm_out: Norm
    conv_out: Conv  # with quant_conv in it
    bias_out: Tensor  # [2 latent channels], f32
    in_channels: int  # of the images; conv_in may take more, which are zero
    n_halvings: int

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device


def unsupported(what: str) -> SDIFastError:
    return SDIFastError(f"vae: the fast encoder does not support {what}")


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise unsupported(what)


class _Packer:
    """Walks the encoder in the order of the data, with the shift that is missing so far."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.shift: Tensor | None = None  # f64
        self.layers: list[Layer] = []

    def cast(self, value: Tensor) -> Tensor:
        value = value.detach().to(device=self.device, dtype=self.dtype)
        form = torch.channels_last if value.ndim == 4 else torch.contiguous_format
        return value.contiguous(memory_format=form)

    def small(self, value: Tensor | None) -> Tensor | None:
        """A vector that kernels widen anyway, at least f32."""
        if value is None:
            return None
        dtype = torch.promote_types(self.dtype, torch.float32)
        return value.detach().to(device=self.device, dtype=dtype).contiguous()

    def norm(self, norm: Any, shift: Tensor | None) -> Norm:
        _expect(isinstance(norm, nn.GroupNorm) and norm.affine, f"the norm {type(norm).__name__}")
        weight, bias = self.small(norm.weight), self.small(norm.bias)
        assert weight is not None and bias is not None
        return Norm(weight, bias, norm.num_groups, norm.eps, self.small(shift))

    def conv(self, weight: Tensor, stride: int = 1) -> Conv:
        flipped = self.cast(weight.flip(2, 3).transpose(0, 1)) if stride == 1 else None
        return Conv(self.cast(weight), flipped)

    def check_conv(self, conv: Any, kernel: int, stride: int = 1, padding: int = 0) -> None:
        fits = isinstance(conv, nn.Conv2d) and conv.padding_mode == "zeros" and conv.groups == 1
        fits = fits and conv.kernel_size == (kernel,) * 2 and conv.stride == (stride,) * 2
        fits = fits and conv.padding == (padding,) * 2 and conv.dilation == (1, 1)
        _expect(fits, f"the convolution {conv}")

    def add(self, *biases: Tensor | None) -> None:
        for bias in biases:
            if bias is not None:
                bias = bias.detach().double()
                self.shift = bias if self.shift is None else self.shift + bias

    def resnet(self, r: Any, whole: bool) -> None:
        """`whole`: its output is to miss nothing."""
        _expect(
            type(r).__name__ == "ResnetBlock2D"
            and r.time_emb_proj is None
            and r.upsample is None
            and r.downsample is None
            and r.output_scale_factor == 1.0
            and isinstance(r.nonlinearity, nn.SiLU),
            f"the block {type(r).__name__} with its settings",
        )
        self.check_conv(r.conv1, 3, padding=1)
        self.check_conv(r.conv2, 3, padding=1)
        norm1 = self.norm(r.norm1, self.shift)
        norm2 = self.norm(r.norm2, _double(r.conv1.bias))
        shortcut = None
        if r.conv_shortcut is not None:
            self.check_conv(r.conv_shortcut, 1)
            weight = r.conv_shortcut.weight[:, :, 0, 0]
            shortcut = self.cast(weight)
            if self.shift is not None:
                self.shift = weight.detach().double() @ self.shift
            self.add(r.conv_shortcut.bias)
        self.add(r.conv2.bias)
        bias = None
        if whole and self.shift is not None:
            bias, self.shift = self.cast(self.shift), None
        conv1, conv2 = self.conv(r.conv1.weight), self.conv(r.conv2.weight)
        self.layers.append(Resnet(norm1, conv1, norm2, conv2, shortcut, bias))

    def downsampler(self, d: Any) -> None:
        fits = type(d).__name__ == "Downsample2D" and d.use_conv and d.padding == 0
        _expect(fits and d.norm is None, f"the downsampler {type(d).__name__} with its settings")
        self.check_conv(d.conv, 3, stride=2)
        self.layers.append(self.conv(d.conv.weight, stride=2))
        self.add(d.conv.bias)

    def attention(self, a: Any) -> None:
        _expect(
            type(a).__name__ == "Attention"
            and a.heads == 1
            and a.residual_connection
            and a.rescale_output_factor == 1.0
            and a.spatial_norm is None
            and a.norm_cross is None
            and a.norm_q is None
            and a.norm_k is None
            and not a.is_cross_attention,
            f"the attention {type(a).__name__} with its settings",
        )
        norm = self.norm(a.group_norm, self.shift)
        parts = [a.to_q, a.to_k, a.to_v]
        zeros = torch.zeros_like(a.to_q.weight[:, 0])
        weights = [p.weight.double() for p in parts]
        biases = [(zeros if p.bias is None else p.bias).double() for p in parts]
        weights[0], biases[0] = weights[0] * a.scale, biases[0] * a.scale
        out = a.to_out[0]
        out_bias = torch.zeros_like(out.weight[:, 0]) if out.bias is None else out.bias
        self.layers.append(
            Attention(
                norm,
                self.cast(torch.cat(weights)),
                self.cast(torch.cat(biases)),
                self.cast(out.weight),
                self.cast(out_bias),
            )
        )


def _check_modules(root: nn.Module) -> None:
    """That no module computes something else than its class says."""
    for name, module in root.named_modules():
        found = alteration(module)
        _expect(not found, f"{found} at {name!r}")
        processor = type(getattr(module, "processor", None)).__name__
        _expect(processor in (*PROCESSORS, "NoneType"), f"the processor {processor} at {name!r}")


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().double()


def _pad(weight: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Zero channels up to the multiple that tensor cores like, for halves."""
    n = weight.shape[dim]
    more = -n % CHANNEL_MULTIPLE if dtype.itemsize == 2 else 0
    shape = [*weight.shape]
    shape[dim] = more
    return torch.cat([weight, weight.new_zeros(shape)], dim) if more else weight


def pack_encoder(vae: Any, dtype: torch.dtype | None = None) -> PackedEncoder:
    """The encoder of an AutoencoderKL, in `dtype` or its own.

    Raises:
        SDIFastError: for a VAE with a feature that the fast encoder lacks, naming it.
    """
    _expect(type(vae).__name__ == "AutoencoderKL", f"the class {type(vae).__name__}")
    _expect(not vae.use_tiling and not vae.use_slicing, "tiling and slicing")
    e = vae.encoder
    _check_modules(e)
    if vae.quant_conv is not None:
        _check_modules(vae.quant_conv)
    first = e.conv_in.weight
    p = _Packer(dtype or first.dtype, first.device)
    p.check_conv(e.conv_in, 3, padding=1)
    conv_in = p.conv(_pad(first, 1, p.dtype))
    p.add(e.conv_in.bias)
    for block in e.down_blocks:
        _expect(type(block).__name__ == "DownEncoderBlock2D", f"the block {type(block).__name__}")
        downsamplers = block.downsamplers or ()
        for i, resnet in enumerate(block.resnets):
            p.resnet(resnet, whole=bool(downsamplers) and i + 1 == len(block.resnets))
        for downsampler in downsamplers:
            p.downsampler(downsampler)
    attentions = list(e.mid_block.attentions or ())
    attentions += [None] * (len(e.mid_block.resnets) - 1 - len(attentions))
    p.resnet(e.mid_block.resnets[0], whole=False)
    for attention, resnet in zip(attentions, e.mid_block.resnets[1:], strict=True):
        if attention is not None:
            p.attention(attention)
        p.resnet(resnet, whole=False)
    _expect(isinstance(e.conv_act, nn.SiLU), f"the activation {type(e.conv_act).__name__}")
    norm_out = p.norm(e.conv_norm_out, p.shift)
    p.check_conv(e.conv_out, 3, padding=1)
    weight, bias = e.conv_out.weight.double(), e.conv_out.bias.double()
    if vae.quant_conv is not None:
        p.check_conv(vae.quant_conv, 1)
        mix = vae.quant_conv.weight[:, :, 0, 0].double()
        weight = torch.einsum("oc,cikl->oikl", mix, weight)
        bias = mix @ bias + vae.quant_conv.bias.double()
    bias_out = p.small(bias)
    assert bias_out is not None
    n_halvings = sum(isinstance(layer, Conv) for layer in p.layers)
    return PackedEncoder(
        conv_in, tuple(p.layers), norm_out, p.conv(weight), bias_out, first.shape[1], n_halvings
    )
