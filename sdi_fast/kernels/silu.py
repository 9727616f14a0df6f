"""SiLU as other kernels call it, in f32: two instructions of the special function unit.

tl.exp and / take care of denormal numbers, which costs more than the function itself: 8 further
instructions a number, in kernels that do little else. Here e^-y below 2^-126 becomes 0, and the
quotient has an error of 2 ulp.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# the interpreter has no PTX, nor has AMD
HAS_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)


@triton.jit
def silu(y: tl.tensor) -> tl.tensor:
    """y / (1 + e^-y) of f32."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .f32 e;
            mul.ftz.f32 e, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 e, e;
            add.ftz.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 e, e;
            mul.ftz.f32 $0, $1, e;
            }
            """,
            "=f,f",
            [y],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return y / (1.0 + tl.exp(-y))
