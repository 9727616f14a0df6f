"""The UNet's elementwise kernels at the sizes of SD 2.1: against PyTorch and the memory's speed.

    python benchmarks/bench_unet_kernels.py [--batch 4] [--rounds 20]

Each call is replayed 20 times from a graph, on inputs that stay in the cache where they fit, as in
the network. GB/s counts what has to move: inputs once, results once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import tyro
from harness import check_close, compare, report
from torch import Tensor

from sdi_fast.ops import unet_ops

REPEATS = 20
# rows, channels of each part
GROUP_NORMS = (
    (4096, (320,)), (4096, (320, 320)), (4096, (640, 320)),
    (1024, (640,)), (1024, (640, 640)), (1024, (1280, 640)),
    (256, (1280,)), (256, (1280, 640)), (256, (1280, 1280)),
    (64, (1280,)), (64, (1280, 1280)),
)  # fmt: skip
LAYERS = ((4096, 320), (1024, 640), (256, 1280), (64, 1280))  # rows, channels


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    batch: int = 4
    rounds: int = 20
    splits: tuple[int, ...] = (0, 1, 16, 32, 64)  # of group norms; 0: the default, 1: one launch
    warps: tuple[int, ...] = (0,)  # of their programs; 0: the default


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            function()
    return graph.replay


def bench(
    name: str, variants: dict[str, Callable[[], Tensor]], n_bytes: int, rounds: int
) -> dict[str, Any]:
    """Times the variants, the first of which is the twin."""
    expected = next(iter(variants.values()))()
    for variant, function in variants.items():
        check_close(f"{name} {variant}", function(), expected, 2e-3)  # f16's rounding is 5e-4
    timings = compare([(n, graphed(f)) for n, f in variants.items()], rounds=rounds)
    row = {}
    for t in timings:
        us = 1e3 * t.median_ms / REPEATS
        row[t.name] = {"us": round(us, 2), "gb_s": round(n_bytes / us / 1e3, 1)}
        print(f"{name:34}{t.name:32}{us:9.2f} us{n_bytes / us / 1e3:9.0f} GB/s")
    return row


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def bench_linear_geglu(m: int, c: int, n: int, rounds: int) -> dict[str, Any]:
    """In one kernel and in two; the bytes are those of one."""
    x, weight = randn(m, c), randn(8 * c, c) * c**-0.5
    bias = randn(8 * c, dtype=torch.float32)
    variants = {
        "reference": lambda: unet_ops.linear_geglu(x, weight, bias, backend="reference"),
        "two": lambda: unet_ops.geglu(torch.mm(x, weight.t()), bias, backend="triton"),
    }
    for tile in unet_ops.linear_geglu_tiles(m, c):
        run = functools.partial(unet_ops.linear_geglu, x, weight, bias, tile=tile)
        variants[str(tile)] = run
    return bench(f"linear_geglu {n} x {c}", variants, 2 * (m + 8 * c) * c + 8 * m * c, rounds)


@torch.no_grad()
def main(args: Args) -> None:
    rows: dict[str, Any] = {}
    for n, sizes in GROUP_NORMS:
        c = sum(sizes)
        parts = [randn(args.batch, n, size) for size in sizes]
        norm = (randn(c, dtype=torch.float32), randn(c, dtype=torch.float32), randn(args.batch, c))

        def group_norm(backend: str, parts: Any = parts, norm: Any = norm, **size: int) -> Any:
            return unet_ops.group_norm(
                parts, *norm, n_groups=32, eps=1e-5, silu=True, backend=backend, **size
            )

        variants = {"reference": lambda f=group_norm: f("reference")}
        for s in args.splits:
            for w in args.warps:
                run = lambda f=group_norm, s=s, w=w: f("triton", splits=s, warps=w)  # noqa: E731
                variants[f"{s} x {w} warps"] = run
        name = f"group_norm {n} x {'+'.join(map(str, sizes))}"
        rows[name] = bench(name, variants, 4 * args.batch * n * c, args.rounds)
    for n, c in LAYERS:
        m = args.batch * n
        x, wide = randn(m, c), randn(m, 8 * c)
        norm = tuple(randn(c, dtype=torch.float32) for _ in range(3))
        bias = randn(8 * c, dtype=torch.float32)
        layer = {
            b: lambda b=b, x=x, norm=norm: unet_ops.layer_norm(x, *norm, eps=1e-5, backend=b)
            for b in ("reference", "triton")
        }
        rows[f"layer_norm {n} x {c}"] = bench(
            f"layer_norm {n} x {c}", layer, 4 * m * c, args.rounds
        )
        gate = {
            b: lambda b=b, wide=wide, bias=bias: unet_ops.geglu(wide, bias, backend=b)
            for b in ("reference", "triton")
        }
        name = f"geglu {n} x {c}"
        rows[name] = bench(name, gate, 24 * m * c, args.rounds)
        rows[f"linear_geglu {n} x {c}"] = bench_linear_geglu(m, c, n, args.rounds)
    big = randn(2**28)
    copy = compare([("copy", lambda: big.clone())], rounds=args.rounds)
    report(
        f"unet_kernels_batch{args.batch}", copy,
        {"copy_gb_s": round(2**30 / copy[0].median_ms / 1e6, 1), "kernels": rows},
    )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
