"""What the packed networks share: whether a module is what its class says, and cuDNN's choice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# attention processors that all compute the same
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
ALL_ALGORITHMS = 0


def alteration(module: nn.Module) -> str:
    """What makes `module` compute something else than its class says; "" where nothing does."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks"
    if isinstance(module, nn.Conv2d | nn.Linear) and type(module) not in (nn.Conv2d, nn.Linear):
        return f"the layer {type(module).__name__}"
    return ""


@contextlib.contextmanager
def cudnn_benchmark(limit: int = ALL_ALGORITHMS) -> Iterator[None]:
    """cuDNN's fastest algorithm a shape, measured at its first call among `limit` of them.

    In torch's deterministic mode the one that it takes without measuring, which two processes
    share.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.benchmark_limit
    cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark_limit = limit
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before
