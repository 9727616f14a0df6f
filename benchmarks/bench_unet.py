"""The UNet of Stable Diffusion 2.1-base at full size: ours against diffusers', on one GPU.

    python benchmarks/bench_unet.py [--batches 1 2 4 8 16] [--quick] [--only ours-graph ...]

Random weights; 64 x 64 latents; 77 tokens; 0.804 TFLOP a sample. Every candidate's output is
compared with f32 before it is timed, and ours with its own eager result after capture. "shared"
is ours where all rows are conditions of one latent, as guidance asks for them; "tuned" measures
every choice among kernels first; --store keeps them for all users of such a GPU; "fp8" has the
transformer blocks' linear layers in e4m3 and is held to FP8_MAX_ERROR. A call's peak is
what it allocates beyond the weights.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from harness import RESULTS, captured, compare, report
from torch import Tensor

from sdi_fast.bench.models import TFLOP_A_SAMPLE, make_unet
from sdi_fast.diffusion.fast_unet import CapturedUNet, FastUNet, FastUNetOptions
from sdi_fast.diffusion.fast_unet.choices import store
from sdi_fast.diffusion.modules import cudnn_benchmark

CANDIDATES = (
    "diffusers", "diffusers-nhwc-graph", "diffusers-compile-graph",
    "ours", "ours-graph", "ours-graph-shared", "ours-tuned-graph", "ours-tuned-graph-shared",
    "ours-fp8-graph", "ours-fp8-graph-shared",
)  # fmt: skip
TUNED = {k: "measured" for k in ("geglu", "norms", "attention", "upsample")}
ERROR_FACTOR = 2.0  # times diffusers' own error at the same precision (style.md 4)
# twice what the reference numerics give for this model on a CPU, f32 but for the blocks' linear
# layers: 0.018, of products that are off by 0.04 each
FP8_MAX_ERROR = 0.036


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    quick: bool = False  # batch 4, few rounds
    only: tuple[str, ...] = CANDIDATES  # diffusers' eager module is always there
    rounds: int = 20
    dtype: str = "float16"
    profile: bool = True  # ours, by kernel, at the batch nearest to 4
    name: str = "unet"  # of the file of results
    store: bool = False  # what was measured, for all users of such a GPU
    options: FastUNetOptions = dataclasses.field(default_factory=FastUNetOptions)


@dataclasses.dataclass
class Inputs:
    """Of one batch: every row with its own text, all with one latent and time step."""

    x: Tensor
    t: Tensor
    context: Tensor

    @classmethod
    def make(cls, batch: int) -> Inputs:
        generator = torch.Generator(device="cuda").manual_seed(batch)
        x = torch.randn(1, 4, 64, 64, device="cuda", generator=generator)
        context = torch.randn(batch, 77, 1024, device="cuda", generator=generator)
        t = torch.full((batch,), 501, device="cuda")
        return cls(x.repeat(batch, 1, 1, 1), t, context)


class Models:
    """What the candidates run on; each is made at its first use."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        self.exact = make_unet().to(self.dtype).float()  # the weights that all others have
        self.made: dict[str, Any] = {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def plain(self) -> Any:
        return self.get("plain", lambda: copy.deepcopy(self.exact).to(self.dtype))

    def nhwc(self) -> Any:
        return self.get(
            "nhwc", lambda: copy.deepcopy(self.plain()).to(memory_format=torch.channels_last)
        )

    def compiled(self) -> Any:
        return self.get("compiled", lambda: torch.compile(self.nhwc(), dynamic=False))

    def fast(self, kind: str) -> FastUNet:
        """`kind`: "given", by the options as they are, "tuned" or "fp8"."""
        changes: dict[str, Any] = {
            "given": {}, "tuned": {**TUNED, "stored": False}, "fp8": {"linears": "fp8"}
        }[kind]  # fmt: skip
        options = dataclasses.replace(self.args.options, **changes)
        return self.get(f"fast {kind}", lambda: FastUNet(self.plain(), options))


def diffusers_call(models: Models, unet: Any, given: Inputs) -> Callable[[], Tensor]:
    x, context = given.x.to(models.dtype), given.context.to(models.dtype)
    if unet is not models.plain():
        x = x.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def call() -> Tensor:
        return unet(x, given.t, encoder_hidden_states=context, return_dict=False)[0]

    return call


def candidate(models: Models, name: str, given: Inputs) -> Callable[[], Tensor]:
    """The call to be timed."""
    if name == "diffusers":
        return diffusers_call(models, models.plain(), given)
    if name == "diffusers-nhwc-graph":
        with cudnn_benchmark(limit=10):  # torch's own
            return captured(diffusers_call(models, models.nhwc(), given))
    if name == "diffusers-compile-graph":
        with cudnn_benchmark(limit=10):  # torch's own
            return captured(diffusers_call(models, models.compiled(), given))
    fast = models.fast(next((kind for kind in ("tuned", "fp8") if kind in name), "given"))
    cache = fast.prepare(given.context)
    x, t = (given.x[:1], given.t[:1]) if "shared" in name else (given.x, given.t)
    if name == "ours":
        fast.warm_up(x, t, cache)
        return lambda: fast.predict_prepared(x, t, cache)
    graph = CapturedUNet(fast, x.shape[0], (64, 64), cache)
    # e4m3 makes much of a last bit that differs
    found = graph.check(tolerance=FP8_MAX_ERROR) if fast.linears == "fp8" else graph.check()
    print(f"  {name}: a replay differs from the eager result by {found:.1e}")
    graph.x.copy_(x)
    graph.t.copy_(t)
    return graph.replay


@torch.no_grad()
def measure_matmul(dtype: torch.dtype, n: int = 8192) -> float:
    """TFLOP/s of an n^3 matrix product."""
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    timing = compare([("matmul", lambda: torch.mm(a, b))], rounds=10, warmup=3)[0]
    return 2.0 * n**3 / timing.median_ms / 1e9


def error_of(out: Tensor, exact: Tensor) -> float:
    if not torch.isfinite(out).all():
        return float("inf")
    return ((out.double() - exact.double()).norm() / exact.double().norm()).item()


def run_batch(models: Models, batch: int, peak_tflops: float) -> None:
    args = models.args
    given = Inputs.make(batch)
    with torch.no_grad():
        rows = [slice(i, i + 4) for i in range(0, batch, 4)]
        exact = torch.cat(
            [
                models.exact(given.x[r], given.t[r], encoder_hidden_states=given.context[r]).sample
                for r in rows
            ]
        )
    names = [n for n in CANDIDATES if n == "diffusers" or n in args.only]
    calls, errors, peaks, left_out = [], {}, {}, {}
    for name in names:
        try:
            begin = time.perf_counter()
            call = candidate(models, name, given)
            print(f"  {name}: ready after {time.perf_counter() - begin:.1f} s", flush=True)
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            errors[name] = error_of(call(), exact)
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            allowed = FP8_MAX_ERROR if "fp8" in name else ERROR_FACTOR * errors["diffusers"]
            if name.startswith("ours") and not errors[name] <= allowed:
                raise AssertionError(f"error {errors[name]:.2e}, allowed {allowed:.2e}")
        except Exception as error:  # one candidate that fails must not cost the others' numbers
            left_out[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"  {name}: left out, {left_out[name]}", flush=True)
            continue
        calls.append((name, call))
    timings = compare(calls, rounds=args.rounds, warmup=3)
    rates = {t.name: TFLOP_A_SAMPLE * batch / t.median_ms * 1e3 for t in timings}
    extra = {
        "batch": batch,
        "matmul_8192_tflops": round(peak_tflops, 1),
        "tflops": {n: round(r, 1) for n, r in rates.items()},
        "share_of_matmul": {n: round(r / peak_tflops, 3) for n, r in rates.items()},
        "relative_error": {n: float(f"{e:.3g}") for n, e in errors.items()},
        "peak_mib_of_a_call": {n: round(p, 1) for n, p in peaks.items()},  # 0 in a graph's pool
        "options": dataclasses.asdict(args.options),
        "left_out": left_out,
    }
    report(f"{args.name}_batch{batch}", timings, extra)


GROUPS = {  # what a kernel's name contains -> what it is; the first that fits
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "group norm": ("group_norm", "partial_statistics"),
    "layer norm": ("layer_norm",),
    "geglu": ("geglu",),
    "casts to e4m3": ("quantise_rows",),
    "convolution": ("conv", "fprop", "cudnn", "implicit", "winograd", "wgrad", "dgrad"),
    "matrix product": ("gemm", "cutlass", "nvjet", "cublas", "splitk", "matmul", "xmma"),
    "copies": ("copy", "memcpy", "interleave", "cat", "memset", "fill"),
}


def group_of(kernel: str) -> str:
    lower = kernel.lower()
    for group, words in GROUPS.items():
        if any(word in lower for word in words):
            return group
    return "other"


def profile(fast: FastUNet, what: str, batch: int, top: int = 25) -> None:
    """Our kernels by time, in one eager call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    given = Inputs.make(batch)
    cache = fast.prepare(given.context)
    fast.warm_up(given.x, given.t, cache)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        fast.predict_prepared(given.x, given.t, cache)
        torch.cuda.synchronize()
    rows = [e for e in prof.key_averages() if e.device_type == DeviceType.CUDA]
    rows.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in rows)
    n_kernels = sum(e.count for e in rows)
    print(f"profile of {what} at batch {batch}: {total / 1e3:.2f} ms in {n_kernels} kernels")
    groups: dict[str, list[float]] = {}
    for event in rows:
        entry = groups.setdefault(group_of(event.key), [0.0, 0])
        entry[0] += event.self_device_time_total
        entry[1] += event.count
    for group, (time_us, count) in sorted(groups.items(), key=lambda g: -g[1][0]):
        print(f"  {group:18}{time_us / 1e3:9.3f} ms {time_us / total:7.1%} {count:5.0f} kernels")
    for event in rows[:top]:
        time_us = event.self_device_time_total
        print(
            f"  {time_us / 1e3:8.3f} ms {time_us / total:6.1%} {event.count:4d} x "
            f"{time_us / event.count:7.1f} us  {event.key[:110]}"
        )


def show_choices(fast: FastUNet, path: Path) -> None:
    """The chosen candidate against the first of each shape; all of them into a file."""
    summary = fast.choices.summary()
    for key, entry in summary.items():
        times = entry["us"]
        first = next(iter(times))
        failed = f", {len(entry['failed'])} failed" if "failed" in entry else ""
        print(
            f"  {times[entry['chosen']]:8.1f} us {entry['chosen']:<28} "
            f"{first} {times[first]:.1f} us{failed}  {key[:90]}"
        )
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main(args: Args) -> None:
    torch.backends.cudnn.allow_tf32 = False  # of the f32 reference
    unknown = set(args.only) - set(CANDIDATES)
    if unknown:
        raise SystemExit(f"only: expected {', '.join(CANDIDATES)}, got {', '.join(unknown)}")
    if args.quick:
        args = dataclasses.replace(args, batches=(4,), rounds=10)
    models = Models(args)
    peak_tflops = measure_matmul(models.dtype)
    for batch in args.batches:
        run_batch(models, batch, peak_tflops)
        gc.collect()
        torch.cuda.empty_cache()
    batch = min(args.batches, key=lambda b: abs(b - 4))
    for what in ("given", "tuned", "fp8"):
        if args.profile and f"fast {what}" in models.made:
            fast = models.fast(what)
            profile(fast, what, batch)
            show_choices(fast, RESULTS / f"{args.name}_choices_{what}.json")
    if args.store and "fast tuned" in models.made:
        fast = models.fast("tuned")
        print(f"stored in {store(fast.choices, fast.device)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
