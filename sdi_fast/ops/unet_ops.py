"""What the frozen UNet does between its matrix products, without autograd.

Activations are channels-last, [B, N, C] with N = h w, in f16, bf16 or f32. Kernels (Triton):
sdi_fast/kernels/group_norm.py, layer_norm.py, geglu.py, linear_geglu.py, interleave.py, conv3x3.py.
`backend` is "triton", "reference" or "auto": Triton on a GPU where it is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import unet_ops as reference
from ..types import SDIFastError
from ._checks import check_tensor
from ._native import resolve_backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def has_copy_engine() -> bool:
    """Whether the GPU has one (TMA): Hopper and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def _use_triton(op: str, x: Tensor, backend: str) -> bool:
    return resolve_backend(op, x, backend, ("triton",)) == "triton"


def _check(
    name: str, value: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None
) -> None:
    """Of `shape`, in one of DTYPES, on `like`'s device."""
    if value.dtype not in DTYPES:
        raise SDIFastError(
            f"{name}: expected dtype float16, bfloat16 or float32, got "
            f"{str(value.dtype).removeprefix('torch.')}"
        )
    check_tensor(name, value, shape, dtype=value.dtype, like=like)


def _residual(value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    """A convolution's residual, checked and contiguous."""
    if value is None:
        return None
    check_tensor("residual", value, shape, dtype=x.dtype, like=x)
    return value.contiguous()


def group_norm(
    parts: Sequence[Tensor],  # 1 or 2 of [B, N, C_i]: normalised as if concatenated
    weight: Tensor,  # [C] f32
    bias: Tensor,  # [C] f32
    shift: Tensor | None,  # [B or 1, C], added first
    *,
    n_groups: int,
    eps: float,
    silu: bool,
    splits: int = 0,  # 1: one launch; more: shares of the rows in two launches; 0: by the size
    warps: int = 0,  # of a program; 0: by its size
    pad_width: int = 0,  # W: put a line and a column of zeros behind each image of N = H W pixels
    backend: str = "auto",
) -> Tensor:
    """Group norm over N and a group's channels, then SiLU where asked for.

    [B, N, C], or [B, (H + 1) (W + 1), C] as conv3x3_padded takes it.
    """
    if not 1 <= len(parts) <= 2:
        raise SDIFastError(f"parts: expected 1 or 2 tensors, got {len(parts)}")
    _check("parts[0]", parts[0], (None, None, None))
    b, n, _ = parts[0].shape
    for i, part in enumerate(parts):
        check_tensor(f"parts[{i}]", part, (b, n, None), dtype=parts[0].dtype, like=parts[0])
    c = sum(part.shape[2] for part in parts)
    if n_groups < 1 or c % n_groups != 0:
        raise SDIFastError(f"n_groups: expected a divisor of {c}, got {n_groups}")
    _check("weight", weight, (c,), parts[0])
    _check("bias", bias, (c,), parts[0])
    if shift is not None:
        _check("shift", shift, (1 if shift.shape[0] == 1 else b, c), parts[0])
    if pad_width and (pad_width < 0 or n % pad_width):
        raise SDIFastError(f"pad_width: expected a divisor of {n}, got {pad_width}")
    options = dict(n_groups=n_groups, eps=eps, silu=silu, pad_width=pad_width)
    if not _use_triton("group_norm", parts[0], backend):
        return reference.group_norm(parts, weight, bias, shift, **options)  # type: ignore[arg-type]
    from ..kernels.group_norm import group_norm as kernel  # here, since Triton is optional

    if shift is not None and shift.stride(1) != 1:
        shift = shift.contiguous()
    return kernel(
        [part.contiguous() for part in parts],
        weight.contiguous(),
        bias.contiguous(),
        shift,
        splits=splits,
        warps=warps,
        **options,  # type: ignore[arg-type]
    )


def layer_norm(
    x: Tensor,  # [M, C]
    weight: Tensor,  # [C] f32
    bias: Tensor,  # [C] f32
    shift: Tensor | None,  # [C] f32, added first
    *,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """Layer norm over the channels, [M, C]."""
    _check("x", x, (None, None))
    _check("weight", weight, (x.shape[1],), x)
    _check("bias", bias, (x.shape[1],), x)
    if shift is not None:
        _check("shift", shift, (x.shape[1],), x)
    if not _use_triton("layer_norm", x, backend):
        return reference.layer_norm(x, weight, bias, shift, eps=eps)
    from ..kernels.layer_norm import layer_norm as kernel

    shift = None if shift is None else shift.contiguous()
    return kernel(x.contiguous(), weight.contiguous(), bias.contiguous(), shift, eps=eps)


def geglu(
    x: Tensor,  # [M, 2 F]: values, then gates
    bias: Tensor,  # [2 F] f32, added first
    *,
    backend: str = "auto",
) -> Tensor:
    """value * gelu(gate), with the exact (erf) gelu, [M, F]."""
    _check("x", x, (None, None))
    if x.shape[1] % 2:
        raise SDIFastError(f"x: expected an even number of columns, got {x.shape[1]}")
    _check("bias", bias, (x.shape[1],), x)
    if not _use_triton("geglu", x, backend):
        return reference.geglu(x, bias)
    from ..kernels.geglu import geglu as kernel

    return kernel(x.contiguous(), bias.contiguous())


def interleave_phases(
    x: Tensor,  # [B, H + 1, W + 1, 4 C]: the four phases (0, 0), (0, 1), (1, 0), (1, 1)
    *,
    backend: str = "auto",
) -> Tensor:
    """out[:, 2 i + a, 2 j + b] = x[:, i + a, j + b, phase (a, b)], [B, 2 H, 2 W, C]."""
    _check("x", x, (None, None, None, None))
    if x.shape[3] % 4 or min(x.shape[1:3]) < 2:
        raise SDIFastError(f"x: expected [B, H + 1, W + 1, 4 C], got {list(x.shape)}")
    if not _use_triton("interleave_phases", x, backend):
        return reference.interleave_phases(x)
    from ..kernels.interleave import interleave_phases as kernel

    return kernel(x.contiguous())


def linear_geglu(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [2 F, K], as torch.nn.Linear has it: values, then gates
    bias: Tensor,  # [2 F] f32
    *,
    tile: Any = None,  # a kernels.linear_geglu.Tile
    backend: str = "auto",
) -> Tensor:
    """geglu of the linear map, without rounding in between, [M, F]."""
    _check("x", x, (None, None))
    check_tensor("weight", weight, (None, x.shape[1]), dtype=x.dtype, like=x)
    if weight.shape[0] % 2:
        raise SDIFastError(f"weight: expected an even number of rows, got {weight.shape[0]}")
    _check("bias", bias, (weight.shape[0],), x)
    if not _use_triton("linear_geglu", x, backend):
        return reference.linear_geglu(x, weight, bias)
    from ..kernels.linear_geglu import linear_geglu as kernel

    return kernel(x.contiguous(), weight.contiguous(), bias.contiguous(), tile)


def linear_geglu_tiles(n_rows: int, n_inner: int) -> tuple[Any, ...]:
    """Tiles worth measuring for x of [n_rows, n_inner] on this machine, the likeliest first."""
    from ..kernels.linear_geglu import geglu_tiles

    return geglu_tiles(n_rows, n_inner, has_copy_engine())


def conv3x3(
    x: Tensor,  # [B, H, W, C]
    weight: Tensor,  # [F, 3, 3, C]
    residual: Tensor | None,  # [B, H, W, F]
    *,
    tile: Any = None,  # a kernels.conv3x3.ConvTile
    backend: str = "auto",
) -> Tensor:
    """3 x 3 convolution with padding 1, plus the residual, [B, H, W, F]."""
    _check("x", x, (None, None, None, None))
    check_tensor("weight", weight, (None, 3, 3, x.shape[3]), dtype=x.dtype, like=x)
    residual = _residual(residual, (*x.shape[:3], weight.shape[0]), x)
    if not _use_triton("conv3x3", x, backend):
        return reference.conv3x3(x, weight, residual)
    from ..kernels.conv3x3 import conv3x3 as kernel

    return kernel(x.contiguous(), weight.contiguous(), residual, tile)


def conv3x3_tiles(n_pixels: int, n_filters: int, n_channels: int) -> tuple[Any, ...]:
    """Tiles worth measuring for a convolution, the likeliest first."""
    from ..kernels.conv3x3 import conv_tiles

    return conv_tiles(n_pixels, n_filters, n_channels)


def conv3x3_padded(
    x: Tensor,  # [B, H + 1, W + 1, C] with zeros in the last line and column
    weight: Tensor,  # [F, 3, 3, C]
    residual: Tensor | None,  # [B, H, W, F]
    *,
    tile: Any = None,  # a kernels.conv3x3.ConvTile
    backend: str = "auto",
) -> Tensor:
    """conv3x3 of the image without its zeros, [B, H, W, F]; Triton needs a Hopper GPU or later."""
    _check("x", x, (None, None, None, None))
    check_tensor("weight", weight, (None, 3, 3, x.shape[3]), dtype=x.dtype, like=x)
    if min(x.shape[1:3]) < 2:
        raise SDIFastError(f"x: expected [B, H + 1, W + 1, C], got {list(x.shape)}")
    shape = (x.shape[0], x.shape[1] - 1, x.shape[2] - 1, weight.shape[0])
    residual = _residual(residual, shape, x)
    if not _use_triton("conv3x3_padded", x, backend):
        return reference.conv3x3_padded(x, weight, residual)
    block = 64 if tile is None else tile.block_k
    if x.shape[3] % block:
        raise SDIFastError(f"x: expected channels in blocks of {block}, got {x.shape[3]}")
    from ..kernels.conv3x3_padded import conv3x3_padded as kernel

    return kernel(x.contiguous(), weight.contiguous(), residual, tile)


def conv3x3_padded_tiles(
    batch: int, height: int, width: int, n_filters: int, n_channels: int
) -> tuple[Any, ...]:
    """The same; () where the channels do not allow it."""
    from ..kernels.conv3x3_padded import padded_tiles

    return padded_tiles(batch, height, width, n_filters, n_channels)
