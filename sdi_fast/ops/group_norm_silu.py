"""Group norm and SiLU on channels-last activations, with a gradient of the input only.

Kernel: sdi_fast/kernels/group_norm_silu.py (Triton). `shift` is a bias that was left out when x was
made: adding it here saves a pass over x.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..reference import group_norm_silu as reference
from ..types import SDIFastError
from ._checks import check_tensor
from ._native import resolve_backend


def group_norm_silu_fwd(
    x: Tensor,  # [B, P, C] f16, bf16, f32 or f64
    shift: Tensor | None,  # [C], added to x first
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    n_groups: int,
    eps: float,
    silu: bool = True,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """silu(gn(x + shift)) like x, and mean and 1 / std of each group, [2, B, G] f32 or f64."""
    _check(x, weight, bias, shift, n_groups)
    shift, weight, bias = _contiguous(shift, weight, bias)
    return _of(x, backend).group_norm_silu_fwd(
        x.contiguous(), shift, weight, bias, n_groups, eps, silu
    )


def group_norm_silu_bwd(
    grad: Tensor,  # [B, P, C], of the result
    x: Tensor,  # [B, P, C], and so on, as in the forward
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,  # [2, B, G], from the forward
    addend: Tensor | None = None,  # [B, P, C]: added to the result, the gradient of a shortcut
    silu: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """The gradient of x, [B, P, C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    check_tensor("statistics", statistics, (2, x.shape[0], None), dtype=wide, like=x)
    _check(x, weight, bias, shift, statistics.shape[2])
    for name, value in (("grad", grad), ("addend", addend)):
        if value is not None:
            check_tensor(name, value, tuple(x.shape), like=x)
    shift, weight, bias = _contiguous(shift, weight, bias)
    return _of(x, backend).group_norm_silu_bwd(
        grad.contiguous(), x.contiguous(), shift, weight, bias, statistics.contiguous(),
        None if addend is None else addend.contiguous(), silu,
    )  # fmt: skip


def _of(x: Tensor, backend: str) -> ModuleType:
    if resolve_backend("group_norm_silu", x, backend, ("triton",)) == "reference":
        return reference
    from ..kernels import group_norm_silu as kernels  # here, since Triton is optional

    return kernels


def _contiguous(
    shift: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    given = None if shift is None else shift.contiguous()
    return given, weight.contiguous(), bias.contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, n_groups: int) -> None:
    if x.ndim != 3 or n_groups < 1 or x.shape[2] % n_groups:
        raise SDIFastError(
            f"x: expected [B, P, C] with C divisible by {n_groups}, got {list(x.shape)}"
        )
    for name, value in (("weight", weight), ("bias", bias), ("shift", shift)):
        if value is not None:
            check_tensor(name, value, (x.shape[2],), dtype=value.dtype, like=x)
