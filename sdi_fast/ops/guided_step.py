"""Guidance and a DDIM step in one launch; the prediction of z (methods.md A, B3, C3, C6, C7).

Kernels: csrc/cpu/guided_step.cpp, csrc/cuda/guided_step.cu, sdi_fast/kernels/guided_step.py
(Triton). No gradients.

A stream of noise is a device tensor rng [2] i64, seed and offset, which no kernel changes: draw d
reads counter offset + d, so that a captured graph ends with rng[1] += its number of draws and every
replay draws anew. The same pair gives the same noise in every backend, up to the rounding of log
and cos.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.guided_step import guided_step as guided_step_reference
from ..types import SDIFastError, StepSpec
from ._checks import check_tensor
from ._native import call, extension, resolve_backend

HALVES = (torch.float16, torch.bfloat16)


def guided_step(
    outputs: Tensor,  # [K, B, C, h, w] f16, bf16, f32 or x's dtype, as the UNet left them
    x: Tensor,  # [B, C, h, w] f32 or f64
    levels: Tensor,  # [T + 1] f32: entry t + 1 is a(t), entry 0 stands for every t < 0
    t: Tensor,  # [B] i64: the level of x
    t_next: Tensor | None,  # [B] i64: where to; None predicts z instead
    neg_weights: Tensor | None,  # [B, 2] where K = 4 (Perp-Neg), None where K = 2
    spec: StepSpec,
    *,
    lengths: Tensor | None = None,  # [B] i64: samples with lengths <= step keep x
    step: int = 0,
    noise: Tensor | None = None,  # [B, C, h, w]: standard normal
    rng: Tensor | None = None,  # [2] i64, seed and offset: draws the noise where none is given
    draw: int = 0,  # which draw after the offset
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x at t_next (or z), and the guided eps, both [B, C, h, w] in x's dtype.

    outputs may be contiguous or channels_last, [K, B, h, w, C] in memory. Without noise and rng no
    noise is added, whatever spec.eta says. A t beyond the last level counts as that.
    """
    _check(outputs, x, levels, (t, t_next, lengths), neg_weights, (noise, rng))
    if spec.eta == 0.0 or t_next is None:
        noise = rng = None
    weights = None if neg_weights is None else neg_weights.to(x.dtype)
    chosen = resolve_backend("guided_step", x, backend, ("cpu", "cuda", "triton"))
    if chosen == "reference":
        return guided_step_reference(
            outputs, x, levels, t, t_next, weights, spec,
            lengths=lengths, step=step, noise=noise, rng=rng, draw=draw,
        )  # fmt: skip
    return _step(
        outputs, x, levels, t, t_next, weights, lengths, noise, rng,
        [step, draw, spec.paper_convention, spec.v_prediction],
        [float(spec.scale), float(spec.eta)], chosen,
    )  # fmt: skip


def _check(
    outputs: Tensor,
    x: Tensor,
    levels: Tensor,
    steps: tuple[Tensor | None, ...],  # t, t_next, lengths
    neg_weights: Tensor | None,
    noises: tuple[Tensor | None, Tensor | None],  # noise, rng
) -> None:
    check_tensor("x", x, (None, None, None, None))
    k = 2 if neg_weights is None else 4
    dtype = outputs.dtype if outputs.dtype in (*HALVES, torch.float32) else x.dtype
    check_tensor("outputs", outputs, (k, *x.shape), dtype=dtype, like=x)
    check_tensor("levels", levels, (None,), dtype=torch.float32, like=x)
    batch = x.shape[0]
    for name, value in zip(("t", "t_next", "lengths"), steps, strict=True):
        if value is not None:
            check_tensor(name, value, (batch,), dtype=torch.int64, like=x)
    if neg_weights is not None:
        check_tensor("neg_weights", neg_weights, (batch, 2), dtype=neg_weights.dtype, like=x)
    noise, rng = noises
    if noise is not None and rng is not None:
        raise SDIFastError("noise, rng: expected at most one of them, got both")
    if noise is not None:
        check_tensor("noise", noise, tuple(x.shape), like=x)
    if rng is not None:
        check_tensor("rng", rng, (2,), dtype=torch.int64, like=x)


def is_channels_last(
    outputs: Tensor,  # [K, B, C, h, w]
) -> bool:
    """Whether it lies as [K, B, h, w, C] in memory and not as its shape says."""
    return not outputs.is_contiguous() and outputs.permute(0, 1, 3, 4, 2).is_contiguous()


@torch.library.custom_op(
    "sdi_fast::guided_step",
    mutates_args=(),
    schema="(Tensor outputs, Tensor x, Tensor levels, Tensor t, Tensor? t_next, "
    "Tensor? neg_weights, Tensor? lengths, Tensor? noise, Tensor? rng, int[] integers, "
    "float[] numbers, str backend) -> (Tensor, Tensor)",
)
def _step(
    outputs: Tensor,
    x: Tensor,
    levels: Tensor,
    t: Tensor,
    t_next: Tensor | None,
    neg_weights: Tensor | None,
    lengths: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    integers: list[int],  # step, draw, paper_convention, v_prediction
    numbers: list[float],  # scale, eta
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not is_channels_last(outputs):
        outputs = outputs.contiguous()
    takes_halves = backend != "cpu" or extension().CPU_TAKES_HALVES
    if outputs.dtype != x.dtype and not (takes_halves and outputs.dtype in HALVES):
        outputs = outputs.to(x.dtype)  # keeps the layout
    small = [
        None if v is None else v.contiguous()
        for v in (levels, t, t_next, neg_weights, lengths, noise, rng)
    ]
    x = x.contiguous()
    if backend == "triton":
        from ..kernels.guided_step import guided_step_launch  # here, since Triton is optional

        return guided_step_launch(outputs, x, small, integers, numbers)
    module = extension()
    step, draw, paper, v_prediction = integers
    flags = module.CHANNELS_LAST * is_channels_last(outputs)
    flags |= module.PAPER_CONVENTION * paper | module.V_PREDICTION * v_prediction
    flags |= module.HALF_OUTPUTS * (outputs.dtype == torch.float16)
    flags |= module.BF16_OUTPUTS * (outputs.dtype == torch.bfloat16)
    batch, channels, height, width = x.shape
    result, eps = torch.empty_like(x), torch.empty_like(x)
    raw = [0 if v is None else v for v in small]
    call(
        "guided_step", x, outputs.shape[0], batch, channels, height * width, levels.numel(),
        outputs, x, *raw, result, eps, step, draw, *numbers, flags,
    )  # fmt: skip
    return result, eps


@_step.register_fake
def _(outputs: Tensor, x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)
