"""What the networks share: whether a module is what its class says, cuDNN's choice, captures."""

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
def capturing(
    graph: torch.cuda.CUDAGraph, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """As torch.cuda.graph, on `stream` or the current one, which must not be the default one.

    Calls of other threads (a checkpoint that waits for its copies) do not break the capture, no
    cache is emptied, and where the block fails that is raised, not that the capture did.

    Args:
        pool: memory to share with other graphs, of which one has to be alive.
    """
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()


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
