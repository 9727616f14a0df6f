"""Calling the fused renderer's kernels on a GPU, or emulated on the CPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from sdi_fast.ops import _native
from sdi_fast.ops import render_views as op
from sdi_fast.types import Camera, RaySums

ON_GPU = torch.cuda.is_available()
EMULATED = not ON_GPU and bool(_native.build_info().get("is_emulated", False))
DEVICE = "cuda" if ON_GPU else "cpu"


def needs_kernels(test: Any) -> Any:
    """Runs on a GPU as a test marked `gpu`, and with emulated kernels without one."""
    if EMULATED:
        return test
    missing = not (ON_GPU and _native.has_cuda())
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs CUDA kernels")(test))


def fused(
    *args: Any,
    alpha_bound: Tensor | None = None,
    jitter: Tensor | None = None,
    deterministic: bool = False,
) -> RaySums:
    """The op's kernels; emulated ones take CPU tensors, which the op itself would refuse."""
    if EMULATED:
        return op._run(*args, alpha_bound, jitter, deterministic)
    return op.render_views(
        *args, alpha_bound=alpha_bound, jitter=jitter, backend="cuda", deterministic=deterministic
    )


# the same with gradients that repeat
repeating = functools.partial(fused, deterministic=True)


def to(camera: Camera, dtype: torch.dtype) -> Camera:
    tensors = {
        f.name: getattr(camera, f.name).to(DEVICE, dtype)
        for f in dataclasses.fields(camera)
        if isinstance(getattr(camera, f.name), Tensor)
    }
    return dataclasses.replace(camera, **tensors)
