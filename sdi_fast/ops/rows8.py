"""Linear maps in e4m3: the kernels that leave a row in e4m3 where they write it, and the product.

The UNet's activations get one f32 scale a row from the row itself, since the kernels hold whole
rows anyway; weights get one an output channel when they are packed. Kernels (Triton):
sdi_fast/kernels/rows8.py; the product is torch._scaled_mm. `backend` is as in unet_ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import rows8 as reference
from ..reference.rows8 import E4M3, Rows8
from ..types import SDIFastError
from ._checks import check_activation, check_gated, check_normed, check_tensor
from ._native import use_triton

MULTIPLE = 16  # of a product's inner and outer size, for torch._scaled_mm on a GPU
CAPABILITY = (8, 9)  # Ada; the first with e4m3 products


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raises SDIFastError where `device` has no e4m3 products with results in `dtype`.

    A device other than a GPU computes with the twins.
    """
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or found < CAPABILITY:
        major, minor = CAPABILITY
        raise SDIFastError(
            f"linears: fp8 needs an NVIDIA GPU of compute capability {major}.{minor} or later, got "
            f"{torch.cuda.get_device_name(device)} of {found[0]}.{found[1]}"
        )
    rows = torch.zeros(MULTIPLE, MULTIPLE, device=device).to(E4M3)
    scale = torch.ones(MULTIPLE, 1, device=device)
    try:
        scaled_mm(rows, scale, rows.t(), scale.t(), dtype)
    except (RuntimeError, ValueError) as error:  # by the versions of torch and cuBLAS
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SDIFastError(
            f"linears: fp8 with one scale a row and results in {dtype} is more than "
            f"torch._scaled_mm has here: {reason}"
        ) from error


def quantise_rows(
    x: Tensor,  # [M, K]
    *,
    backend: str = "auto",
) -> Rows8:
    """The rows in e4m3: values [M, K] and scale [M, 1] f32."""
    check_activation("x", x, (None, None))
    if not use_triton("quantise_rows", x, backend):
        return reference.quantise_rows(x)
    from ..kernels.rows8 import quantise_rows as kernel  # here, since Triton is optional

    return kernel(x.contiguous())


def layer_norm8(
    x: Tensor,  # [M, C] contiguous
    added: Tensor | None,  # [M, C], added to x in place first
    weight: Tensor,  # [C] f32
    bias: Tensor,  # [C] f32
    shift: Tensor | None,  # [C] f32, added for the norm alone
    *,
    eps: float,
    backend: str = "auto",
) -> Rows8:
    """Layer norm over the channels, in e4m3."""
    check_normed(x, weight, bias, shift)
    if added is not None:
        check_tensor("added", added, tuple(x.shape), dtype=x.dtype, like=x)
        if not x.is_contiguous():
            raise SDIFastError("x: expected a contiguous tensor, which is updated in place")
    if not use_triton("layer_norm8", x, backend):
        return reference.layer_norm8(x, added, weight, bias, shift, eps=eps)
    from ..kernels.rows8 import layer_norm8 as kernel

    added = None if added is None else added.contiguous()
    shift = None if shift is None else shift.contiguous()
    return kernel(x.contiguous(), added, weight.contiguous(), bias.contiguous(), shift, eps=eps)


def geglu8(
    x: Tensor,  # [M, 2 F]: values, then gates
    bias: Tensor,  # [2 F] f32, added first
    *,
    backend: str = "auto",
) -> Rows8:
    """value * gelu(gate), with the exact (erf) gelu, in e4m3: values [M, F] and scale [M, 1]."""
    check_gated(x, bias)
    if not use_triton("geglu8", x, backend):
        return reference.geglu8(x, bias)
    from ..kernels.rows8 import geglu8 as kernel

    return kernel(x.contiguous(), bias.contiguous())


def linear8(
    x: Tensor,  # [M, K] e4m3
    x_scale: Tensor,  # [M, 1] f32
    weight: Tensor,  # [K, N] e4m3, a view of rows of K; on a GPU K and N multiples of MULTIPLE
    weight_scale: Tensor,  # [1, N] f32
    *,
    dtype: torch.dtype,  # of the result
    backend: str = "auto",  # "reference": the twin; else torch's own on a GPU, which Triton is not
) -> Tensor:
    """The product, [M, N]."""
    check_tensor("x", x, (None, None), dtype=E4M3)
    check_tensor("x_scale", x_scale, (x.shape[0], 1), dtype=torch.float32, like=x)
    check_tensor("weight", weight, (x.shape[1], None), dtype=E4M3, like=x)
    check_tensor("weight_scale", weight_scale, (1, weight.shape[1]), dtype=torch.float32, like=x)
    if not x.is_cuda or backend == "reference":
        return reference.linear8(x, x_scale, weight, weight_scale, dtype=dtype)
    return scaled_mm(x, x_scale, weight, weight_scale, dtype)


def scaled_mm(
    x: Tensor,  # as in linear8, and so on
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """torch._scaled_mm with one scale a row and one a column; nothing is read on the host.

    Fast accumulation drops bits of the sums that e4m3's rounding of the factors has lost before.
    """
    return torch._scaled_mm(x, weight, x_scale, weight_scale, out_dtype=dtype, use_fast_accum=True)
