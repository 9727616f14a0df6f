"""The VAE encoder of Stable Diffusion 2.1 at full size, forward and input gradient: ours against
diffusers'.

    python benchmarks/bench_vae.py [--quick] [--size 512] [--rounds 20] [--only ours-graph ...]

Random weights; 1.117 TFLOP forward at 512 x 512 and as much again for the gradient of the image.
Every candidate's result and gradient are compared with f32 before it is timed. "extra MiB" is what
one forward and backward allocate beyond the weights and, for graphs, hold.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import tyro
from harness import compare, report
from torch import Tensor, nn

from sdi_fast.bench.models import make_vae
from sdi_fast.diffusion.encoder_graph import EncoderGraph
from sdi_fast.diffusion.fast_encoder import FastEncoder
from sdi_fast.diffusion.modules import cudnn_benchmark
from sdi_fast.diffusion.vae_pack import pack_encoder

TFLOP_512 = 1.117  # forward, one image of 512 x 512
CANDIDATES = ("diffusers", "diffusers-nhwc", "compile", "compile-graph", "ours", "ours-graph")
ERROR_FACTOR = 2.0  # times diffusers' own error at the same precision (style.md 4)
Result = tuple[Tensor, Tensor]  # the posterior's parameters, the image's gradient


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    size: int = 512  # pixels a side
    batch: int = 1
    quick: bool = False  # few rounds
    rounds: int = 20
    only: tuple[str, ...] = CANDIDATES  # "diffusers" is always there
    profile: bool = True  # ours, by kernel
    name: str = "vae"  # of the file of results


class Encode(nn.Module):
    """The posterior's parameters of an image, as a module that graphs and compilers take."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))


def by_autograd(module: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Result:
    leaf = x.detach().requires_grad_()
    out = module(leaf)
    return out, torch.autograd.grad(out, leaf, grad)[0]


def model_of(name: str, vae: Any) -> Any:
    """What the candidate runs on, with weights of its own: outside of its memory's count."""
    if name.startswith("ours"):
        return FastEncoder(pack_encoder(vae))
    module: Any = Encode(copy.deepcopy(vae))
    if name != "diffusers":
        module = module.to(memory_format=torch.channels_last)
    return torch.compile(module, dynamic=False) if name.startswith("compile") else module


def candidate(name: str, model: Any, x: Tensor, grad: Tensor) -> Callable[[], Result]:
    """Forward and backward of the half-precision model, to be timed."""
    if name == "ours-graph":
        graph = EncoderGraph(model, x, capture=True)
        print(f"  {name}: a replay differs from the eager result by {graph.check(x, grad):.1e}")
        return lambda: (graph.forward(x), graph.backward(grad))
    if name == "ours":

        def eager() -> Result:
            out, tape = model.forward(x)
            return out, model.backward(grad, tape)

        return eager
    half, g = x.half(), grad.half()
    if name != "diffusers":
        half = half.contiguous(memory_format=torch.channels_last)
    if name.endswith("graph"):
        model = torch.cuda.make_graphed_callables(model, (half.clone().requires_grad_(),))
    return lambda: by_autograd(model, half, g)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    error = float((a.double() - b.double()).norm() / b.double().norm())
    return error if error == error else float("inf")


def prepare(
    name: str, vae: Any, x: Tensor, grad: Tensor, exact: Result
) -> tuple[Callable[[], Result], dict[str, float]]:
    """The candidate, its errors against f32 and its memory."""
    model = model_of(name, vae)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with cudnn_benchmark():
        call = candidate(name, model, x, grad)
        result = call()
    errors = [relative(a, b) for a, b in zip(result, exact, strict=True)]
    peak = torch.cuda.max_memory_allocated() - before
    return call, {"error": errors[0], "gradient_error": errors[1], "extra_mib": peak / 2**20}


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """No tf32, for the numbers that all others are compared with."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def profile(call: Callable[[], Result]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as prof:
        call()
        torch.cuda.synchronize()
    print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=25))


def main(args: Args) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench_vae.py: expected a CUDA device, found none")
    exact_vae = make_vae("cuda").half().float()  # the weights that all others have
    vae = copy.deepcopy(exact_vae).half()
    generator = torch.Generator(device="cuda").manual_seed(1)
    x = torch.rand(args.batch, 3, args.size, args.size, device="cuda", generator=generator) * 2 - 1
    side = args.size // 8
    grad = torch.randn(args.batch, 8, side, side, device="cuda", generator=generator)
    with exact_convolutions():
        exact = by_autograd(Encode(exact_vae), x, grad)
    exact = exact[0].detach(), exact[1]
    del exact_vae

    names = [n for n in CANDIDATES if n == "diffusers" or n in args.only]
    calls, facts = [], {}
    for name in names:
        try:
            call, facts[name] = prepare(name, vae, x, grad, exact)
        except Exception as error:  # a peer that cannot be captured here is no reason to stop
            if name.startswith("ours"):
                raise
            print(f"  {name}: left out: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        print(f"  {name}: {facts[name]}")
        for key in ("error", "gradient_error"):
            allowed = ERROR_FACTOR * facts["diffusers"][key]
            if name.startswith("ours") and not facts[name][key] <= allowed:
                raise AssertionError(f"{name}: {key} {facts[name][key]:.2e}, allowed {allowed:.1e}")
        calls.append((name, call))
    with cudnn_benchmark():
        timings = compare(calls, rounds=5 if args.quick else args.rounds, warmup=3)
    tflop = 2 * TFLOP_512 * args.batch * (args.size / 512) ** 2
    for t in timings:
        facts[t.name]["tflops"] = tflop / t.median_ms * 1e3
    rows = {name: {k: float(f"{v:.4g}") for k, v in fact.items()} for name, fact in facts.items()}
    report(args.name, timings, {"size": args.size, "batch": args.batch, "candidates": rows})
    if args.profile and calls[-1][0].startswith("ours"):
        profile(calls[-1][1])


if __name__ == "__main__":
    main(tyro.cli(Args))
