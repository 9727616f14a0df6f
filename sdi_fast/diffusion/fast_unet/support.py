"""Which UNets the fast module can stand in for; everything else is refused by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...types import SDIFastError
from ..modules import PROCESSORS, alteration

# setting of the config -> values that mean "not used"
EXPECTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default", None),
    "center_input_sample": (False, None),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False, None),
    "conv_in_kernel": (3, None),
    "conv_out_kernel": (3, None),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1, None),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1, 1.0, None),
    "resnet_skip_time_act": (False, None),
    "resnet_time_scale_shift": ("default", None),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional", None),
    "timestep_post_act": (None,),
}
BLOCKS = {
    "down_blocks": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_blocks": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block": ("UNetMidBlock2DCrossAttn",),
}
ABSENT_IN_ATTENTION = (
    "group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim",
    "residual_connection",
)  # fmt: skip


def fail(what: str) -> SDIFastError:
    return SDIFastError(
        f"unet: the fast UNet does not support {what}; use the diffusers denoiser for this model"
    )


def check_supported(unet: Any) -> None:
    """Raises SDIFastError, naming the feature, where `unet` has one that is not implemented."""
    if type(unet).__name__ != "UNet2DConditionModel":
        raise fail(f"the class {type(unet).__name__} (only UNet2DConditionModel)")
    for name, allowed in EXPECTED.items():
        value = unet.config.get(name, allowed[0])
        if value not in allowed:
            raise fail(f"{name} = {value!r}")
    only_cross = unet.config.get("only_cross_attention", False)
    if only_cross is True or (isinstance(only_cross, list | tuple) and any(only_cross)):
        raise fail(f"only_cross_attention = {only_cross!r}")
    if unet.conv_norm_out is None:
        raise fail("norm_num_groups = None")
    for group, names in BLOCKS.items():
        blocks = getattr(unet, group)
        for block in blocks if isinstance(blocks, nn.ModuleList) else [blocks]:
            if type(block).__name__ not in names:
                raise fail(f"the block {type(block).__name__}")
            if getattr(block, "s1", None) or getattr(block, "b1", None):
                raise fail("FreeU")
    for name, module in unet.named_modules():
        _check_module(name, module)


def _check_module(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if found := alteration(module):
        raise fail(f"{found} at {name!r}")
    if kind == "Attention":
        _check_attention(name, module)
    elif kind == "BasicTransformerBlock":
        _check_transformer_block(name, module)
    elif kind == "Transformer2DModel":
        if not getattr(module, "is_input_continuous", True):
            raise fail(f"discrete input at {name!r}")
    elif kind == "ResnetBlock2D":
        _check_resnet(name, module)


def _check_attention(name: str, attention: Any) -> None:
    processor = type(attention.processor).__name__
    if processor not in PROCESSORS:
        raise fail(f"the attention processor {processor} (at {name!r})")
    for member in ABSENT_IN_ATTENTION:
        if getattr(attention, member, None) not in (None, False):
            raise fail(f"{member} of the attention at {name!r}")
    for linear in ("to_q", "to_k", "to_v"):
        layer = getattr(attention, linear)
        if type(layer) is not nn.Linear or layer.bias is not None:
            raise fail(f"{linear} with a bias or of another class at {name!r}")
    if type(attention.to_out[0]) is not nn.Linear:
        raise fail(f"the layer {type(attention.to_out[0]).__name__} at {name!r}")
    head_dim = attention.to_q.out_features // attention.heads
    if abs(attention.scale * head_dim**0.5 - 1.0) > 1e-6:
        raise fail(f"the attention scale {attention.scale} at {name!r}")
    if getattr(attention, "rescale_output_factor", 1.0) != 1.0:
        raise fail(f"rescale_output_factor at {name!r}")


def _check_transformer_block(name: str, block: Any) -> None:
    if getattr(block, "norm_type", "layer_norm") != "layer_norm":
        raise fail(f"norm_type {block.norm_type!r} at {name!r}")
    if getattr(block, "pos_embed", None) is not None:
        raise fail(f"positional embeddings at {name!r}")
    if block.attn2 is None or hasattr(block, "fuser"):
        raise fail(f"a transformer block without cross-attention or with a fuser at {name!r}")
    if block.attn1.to_k.in_features != block.attn1.to_q.in_features:
        raise fail(f"cross-attention in attn1 at {name!r}")
    activation = type(block.ff.net[0]).__name__
    if activation != "GEGLU" or block.ff.net[0].proj.bias is None:
        raise fail(f"the feed-forward {activation} at {name!r}")


def _check_resnet(name: str, resnet: Any) -> None:
    if resnet.upsample is not None or resnet.downsample is not None:
        raise fail(f"a resampling resnet at {name!r}")
    if getattr(resnet, "time_embedding_norm", "default") != "default":
        raise fail(f"time_embedding_norm {resnet.time_embedding_norm!r} at {name!r}")
    if resnet.output_scale_factor != 1.0 or getattr(resnet, "skip_time_act", False):
        raise fail(f"output_scale_factor or skip_time_act at {name!r}")
    if resnet.time_emb_proj is None:
        raise fail(f"a resnet without time embedding at {name!r}")
