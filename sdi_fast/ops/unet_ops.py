"""What the frozen UNet does between its matrix products, without autograd.

Activations are channels-last, [B, N, C] with N = h w, in f16, bf16 or f32. Kernels (Triton):
sdi_fast/kernels/group_norm.py, layer_norm.py, geglu.py, linear_geglu.py, interleave.py.
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
from ._checks import check_activation, check_gated, check_normed, check_tensor
from ._native import use_triton

ROW_BYTES = 16  # the copy engine's rows are multiples of it


@functools.cache
def has_copy_engine() -> bool:
    """Whether the GPU has one (TMA): Hopper and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


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
    backend: str = "auto",
) -> Tensor:
    """Group norm over N and a group's channels, then SiLU where asked for, [B, N, C]."""
    if not 1 <= len(parts) <= 2:
        raise SDIFastError(f"parts: expected 1 or 2 tensors, got {len(parts)}")
    check_activation("parts[0]", parts[0], (None, None, None))
    b, n, _ = parts[0].shape
    for i, part in enumerate(parts):
        check_tensor(f"parts[{i}]", part, (b, n, None), dtype=parts[0].dtype, like=parts[0])
    c = sum(part.shape[2] for part in parts)
    if n_groups < 1 or c % n_groups != 0:
        raise SDIFastError(f"n_groups: expected a divisor of {c}, got {n_groups}")
    check_activation("weight", weight, (c,), parts[0])
    check_activation("bias", bias, (c,), parts[0])
    if shift is not None:
        check_activation("shift", shift, (1 if shift.shape[0] == 1 else b, c), parts[0])
    options = dict(n_groups=n_groups, eps=eps, silu=silu)
    if not use_triton("group_norm", parts[0], backend):
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
    check_normed(x, weight, bias, shift)
    if not use_triton("layer_norm", x, backend):
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
    check_gated(x, bias)
    if not use_triton("geglu", x, backend):
        return reference.geglu(x, bias)
    from ..kernels.geglu import geglu as kernel

    return kernel(x.contiguous(), bias.contiguous())


def interleave_phases(
    x: Tensor,  # [B, H + 1, W + 1, 4 C]: the four phases (0, 0), (0, 1), (1, 0), (1, 1)
    *,
    backend: str = "auto",
) -> Tensor:
    """out[:, 2 i + a, 2 j + b] = x[:, i + a, j + b, phase (a, b)], [B, 2 H, 2 W, C]."""
    check_activation("x", x, (None, None, None, None))
    if x.shape[3] % 4 or min(x.shape[1:3]) < 2:
        raise SDIFastError(f"x: expected [B, H + 1, W + 1, 4 C], got {list(x.shape)}")
    if not use_triton("interleave_phases", x, backend):
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
    check_activation("x", x, (None, None))
    check_tensor("weight", weight, (None, x.shape[1]), dtype=x.dtype, like=x)
    if weight.shape[0] % 2:
        raise SDIFastError(f"weight: expected an even number of rows, got {weight.shape[0]}")
    check_activation("bias", bias, (weight.shape[0],), x)
    if not use_triton("linear_geglu", x, backend):
        return reference.linear_geglu(x, weight, bias)
    multiple = ROW_BYTES // x.element_size()
    if x.shape[1] % multiple:
        raise SDIFastError(f"x: expected a multiple of {multiple} columns, got {x.shape[1]}")
    from ..kernels.linear_geglu import linear_geglu as kernel

    return kernel(x.contiguous(), weight.contiguous(), bias.contiguous(), tile)


def linear_geglu_tiles(n_rows: int, n_inner: int) -> tuple[Any, ...]:
    """Tiles worth measuring for x of [n_rows, n_inner], the likeliest first."""
    from ..kernels.linear_geglu import geglu_tiles

    return geglu_tiles(n_rows, n_inner)
