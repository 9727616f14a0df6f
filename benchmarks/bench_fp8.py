"""What fp8 matrix products would gain the UNet of Stable Diffusion 2.1-base, on one GPU.

    python benchmarks/bench_fp8.py [--batch 4]

Every linear layer of one call (attention's and the feed-forwards', without the text's, which are
cached) as torch.mm in f16 and as torch._scaled_mm in e4m3, with and without the cast of its input,
which a kernel before it would have to do. Products are compared with f32 first: the error is told,
since e4m3's 3 bits of mantissa cannot be held to f16's. Convolutions, half of the UNet's work, have
no fp8 kernels in PyTorch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import tyro
from harness import Timing, captured, compare, relative_error, report
from torch import Tensor

WIDTHS = {4096: (320, 5), 1024: (640, 5), 256: (1280, 5), 64: (1280, 1)}  # pixels: C, blocks
LAYERS = {  # name: inputs, outputs in C; layers a block
    "q, k, v": (1, 3, 1), "C to C": (1, 1, 5), "feed-forward, in": (1, 8, 1),
    "feed-forward, out": (4, 1, 1),
}  # fmt: skip
REPEATS = 10  # calls in one graph
F8_MAX_ERROR = 0.06  # of a product of normal numbers: rounding of both factors, 2^-4 at most each


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    batch: int = 4  # rows of 64 x 64 latents
    rounds: int = 20
    name: str = "fp8"  # of the file of results


def graphed(function: Any) -> Any:
    def repeat() -> None:
        for _ in range(REPEATS):
            function()

    return captured(repeat)


def measure(m: int, k: int, n: int, rounds: int) -> dict[str, float]:
    """Microseconds of one layer, and the product's error against f32."""
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.float16) * k**-0.5
    scale = (weight.abs().amax() / 448.0).float()  # e4m3 ends at 448
    weight8 = (weight / scale).to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")

    def product8(x8: Tensor) -> Tensor:
        return torch._scaled_mm(
            x8, weight8.t(), one, scale, out_dtype=torch.float16, use_fast_accum=True
        )

    x8 = x.to(torch.float8_e4m3fn)
    exact = x.float() @ weight.float().t()
    half, eighth = relative_error(x @ weight.t(), exact), relative_error(product8(x8), exact)
    if not (half < 1e-3 and eighth < F8_MAX_ERROR):
        raise AssertionError(f"{m} x {k} x {n}: errors {half:.1e} (f16), {eighth:.1e} (e4m3)")
    timings: list[Timing] = compare(
        [
            ("f16", graphed(lambda: torch.mm(x, weight.t()))),
            ("e4m3", graphed(lambda: product8(x8))),
            ("cast and e4m3", graphed(lambda: product8(x.to(torch.float8_e4m3fn)))),
        ],
        rounds=rounds,
    )
    us = {t.name: 1e3 * t.median_ms / REPEATS for t in timings}
    return {**us, "f16 error": half, "e4m3 error": eighth}


@torch.no_grad()
def main(args: Args) -> None:
    rows: dict[str, Any] = {}
    total = dict.fromkeys(("f16", "e4m3", "cast and e4m3"), 0.0)
    for pixels, (width, blocks) in WIDTHS.items():
        for name, (inputs, outputs, layers) in LAYERS.items():
            m, k, n = args.batch * pixels, inputs * width, outputs * width
            found = measure(m, k, n, args.rounds)
            label = f"{name}: {m} x {k} x {n}, {blocks * layers} times"
            rows[label] = {key: float(f"{value:.4g}") for key, value in found.items()}
            print(f"  {label}: {rows[label]}", flush=True)
            for key in total:
                total[key] += 1e-3 * found[key] * blocks * layers
    print("a call's linear layers, ms:", {k: round(v, 3) for k, v in total.items()})
    report(args.name, [], {"batch": args.batch, "ms_of_a_call": total, "layers": rows})


if __name__ == "__main__":
    main(tyro.cli(Args))
