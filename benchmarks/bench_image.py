"""The ops on images and rays: compositing, the convexity loss, the losses on rays, on a GPU.

CUDA against Triton against the PyTorch twin, forward + backward, outputs and gradients checked
against the f64 twin first. Times are those of a CUDA graph's replay (what an engine pays) with the
L2 cache flushed by a write between two replays; the graph's outputs are checked too. The twin runs
eagerly.

    python benchmarks/bench_image.py [--size 512] [--samples 60] [--out DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from sdi_fast.ops.composite import composite
from sdi_fast.ops.convexity import convexity_loss
from sdi_fast.ops.ray_losses import ray_losses
from sdi_fast.types import Samples

# Relative L2 errors in f32 against the f64 twin: some ulps times the length of the sums; variances
# and gradients of opaque rays are differences of nearly equal numbers.
TOLERANCE = 2e-3


def disc_samples(size: int, most: int, device: str) -> Samples:
    """Rays of a disc of half the image, up to `most` samples each, none outside."""
    place = torch.arange(size, device=device) - 0.5 * (size - 1)
    radius = (place[:, None].square() + place.square()).sqrt().flatten() / (0.45 * size)
    count = (most * (1 - radius.square()).clamp_min(0).sqrt()).round().long()
    first = count.cumsum(0) - count
    ray = torch.repeat_interleave(torch.arange(size * size, device=device), count)
    step = 0.0135
    t_starts = 1.0 + step * (torch.arange(len(ray), device=device) - first[ray])
    return Samples(ray, t_starts, t_starts + step, torch.stack([first, count], dim=-1))


def inputs_of(
    op: str, size: int, most: int, device: str
) -> tuple[list[Tensor], Callable[..., Any]]:
    """Leaves, and function(backend, *leaves) -> outputs."""
    draws = torch.Generator(device).manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draws, device=device)

    def unit(n: int) -> Tensor:
        return torch.nn.functional.normalize(rand(n, 3) - 0.5, dim=-1)

    if op == "composite":
        samples = disc_samples(size, most, device)
        n, directions = samples.n_samples, unit(size * size)

        def run(backend: str, *leaves: Tensor) -> tuple[Tensor, ...]:
            dtype = leaves[0].dtype
            here = Samples(
                samples.ray_indices,
                samples.t_starts.to(dtype),
                samples.t_ends.to(dtype),
                samples.packed_info,
            )
            out = composite(*leaves, here, directions.to(dtype), backend=backend)
            sums = (out.rgb, out.opacity, out.depth, out.normal_sum, out.z_variance, out.orient)
            return sums

        return [3 * rand(n), rand(n, 3), unit(n)], run
    if op == "ray_losses":
        n = size * size
        return [rand(n), rand(n), rand(n)], lambda backend, *x: (ray_losses(*x, backend=backend),)
    if op == "convexity":
        normals = rand(1, size, size, 3)
        return [normals], lambda backend, *x: (convexity_loss(*x, backend=backend),)
    c2w = torch.eye(3, 4, device=device)[None]
    leaves = [rand(1, size, size, 3), rand(1, size, size, 1)]
    return leaves, lambda backend, *x: (convexity_loss(*x, c2w.to(x[0].dtype), backend=backend),)


def step_of(
    run: Callable[..., Sequence[Tensor]], backend: str, leaves: Sequence[Tensor]
) -> list[Tensor]:
    outputs = run(backend, *leaves)
    draws = torch.Generator(leaves[0].device).manual_seed(1)
    cotangents = [
        torch.randn(o.shape, generator=draws, device=o.device).to(o.dtype) for o in outputs
    ]
    grads = torch.autograd.grad(list(outputs), list(leaves), cotangents)
    return [*(o.detach() for o in outputs), *grads]  # nothing that keeps this stream's nodes


def graph_of(
    run: Callable[..., Sequence[Tensor]], backend: str, leaves: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]:
    """A graph of forward + backward, its results, and the cotangents that it reads."""
    cotangents = [torch.randn_like(o) for o in run(backend, *leaves)]

    def step() -> list[Tensor]:
        here = [x.detach().requires_grad_() for x in leaves]  # of the stream in use
        outputs = run(backend, *here)
        grads = torch.autograd.grad(list(outputs), here, cotangents)
        return [*(o.detach() for o in outputs), *grads]

    graph, results = harness.capture(step)
    return graph, results, cotangents


def timed(function: Callable[[], Any], flush: Tensor, rounds: int) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def timed_graph(
    run: Callable[..., Sequence[Tensor]],
    backend: str,
    leaves: Sequence[Tensor],
    flush: Tensor,
    rounds: int,
) -> float:
    """The same of a graph's replay, after its results were compared with eager ones."""
    graph, results, cotangents = graph_of(run, backend, leaves)
    for r in results:
        r.fill_(float("nan"))
    graph.replay()
    outputs = run(backend, *leaves)
    eager = [*outputs, *torch.autograd.grad(list(outputs), list(leaves), cotangents)]
    for i, (a, b) in enumerate(zip(results, eager, strict=True)):
        harness.check_close(f"{backend} replay {i}", a, b, 1e-6)
    return timed(graph.replay, flush, rounds)


def measure(op: str, size: int, most: int, rounds: int) -> list[dict[str, Any]]:
    leaves, run = inputs_of(op, size, most, "cuda")
    leaves = [x.requires_grad_() for x in leaves]
    exact = step_of(run, "reference", [x.detach().double().requires_grad_() for x in leaves])
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    rows = []
    for backend in ("cuda", "triton", "reference"):
        if backend == "triton" and op not in ("composite", "convexity"):
            continue
        ours = step_of(run, backend, leaves)
        error = max(
            harness.check_close(f"{op} {backend} {i}", a, e, TOLERANCE)
            for i, (a, e) in enumerate(zip(ours, exact, strict=True))
        )
        if backend == "reference":
            us = timed(lambda: step_of(run, "reference", leaves), flush, rounds)
        else:
            us = timed_graph(run, backend, leaves, flush, rounds)
        rows.append({"op": op, "backend": backend, "us": us, "error": error})
        print(f"{op:20} {backend:10} {us:9.1f} us   error {error:.1e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--samples", type=int, default=60, help="of the longest ray")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    rows = []
    for op in ("composite", "convexity", "convexity_camera", "ray_losses"):
        rows += measure(op, options.size, options.samples, options.rounds)
    extra = {"size": options.size, "samples": options.samples, "rows": rows}
    harness.save(f"image_{harness.gpu_slug()}", extra, options.out)


if __name__ == "__main__":
    main()
