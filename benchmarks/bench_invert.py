"""SDI's target, inversion and prediction, on the UNet of Stable Diffusion 2.1-base at full size.

    python benchmarks/bench_invert.py [--quick] [--t 980 615 250] [--only static ...]

Random weights; 64 x 64 latents; Perp-Neg, so that a call is a batch of 4. At t = 980, 615 and 250
an exact target takes 12, 9 and 5 calls. Every candidate's target is compared with f32 before it is
timed. "calls" is a target's time in calls of the same UNet, captured alone: what is above "work",
the UNet calls' worth that it computes, is overhead. The approximate candidates (balanced, turbo:
config.SPEEDS, on the fast UNet) compute less; their error is told and not bounded. The guided step
alone is timed for both of its GPU backends.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from harness import Timing, captured, compare, report
from torch import Tensor

from sdi_fast.bench.models import TFLOP_A_SAMPLE, make_unet, sd_schedule
from sdi_fast.config import SPEEDS, GuidanceConfig
from sdi_fast.diffusion.denoiser import Denoiser, make_denoiser
from sdi_fast.diffusion.invert import n_unet_calls
from sdi_fast.diffusion.modules import cudnn_benchmark
from sdi_fast.diffusion.prompt import Condition
from sdi_fast.diffusion.schedule import DDIMSchedule
from sdi_fast.diffusion.shortcuts import ConditionedUNet, plan_calls, target_work
from sdi_fast.guidance import SDI
from sdi_fast.ops.guided_step import guided_step
from sdi_fast.types import StepSpec

DELTA = 37
# eager: ddim_invert, a launch a kernel; static: InversionGraphs; nhwc: channels_last
CANDIDATES = (
    "eager", "compile", "static", "static-nhwc", "static-compile", "static-fast",
    "static-balanced", "static-turbo",
)  # fmt: skip
ERROR_FACTOR = 2.0  # times the eager one's error at the same precision (style.md 4)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    t: tuple[int, ...] = (980, 615, 250)
    batch: int = 1  # views or prompts at once
    quick: bool = False  # t = 250 only, few rounds
    rounds: int = 10
    only: tuple[str, ...] = CANDIDATES  # "eager" is always there
    steps: bool = True  # the guided step alone
    name: str = "invert"  # of the file of results


class Case:
    """One batch's inputs; the noise is given, so that all candidates compute the same."""

    def __init__(self, batch: int, t: int, schedule: DDIMSchedule) -> None:
        generator = torch.Generator().manual_seed(t)
        config = GuidanceConfig()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).cuda()

        self.t = torch.full((batch,), t)
        self.delta = torch.full((batch,), DELTA)
        self.z = 0.8 * normal(batch, 4, 64, 64)
        weights = torch.tensor([[-0.7, -1.6]]).repeat(batch, 1).cuda()
        self.condition = Condition(normal(4, batch, 77, 1024), weights)
        self.n_calls = n_unet_calls(schedule, t, config)
        self.noise = normal(self.n_calls - 1, batch, 4, 64, 64)

    def target(self, sdi: SDI) -> Tensor:
        noise = self.noise[: n_unet_calls(sdi.model.schedule, int(self.t[0]), sdi.config) - 1]
        return sdi.target(
            self.z, self.condition, self.t, None, delta=self.delta, eta_noise=noise
        ).target


class Models:
    """UNets and denoisers, each made at its first use."""

    def __init__(self) -> None:
        self.schedule = sd_schedule()
        self.exact = make_unet().half().float()  # the weights that all others have
        self.half = copy.deepcopy(self.exact).half()

    def sdi(self, denoiser: Any, static: bool, speed: Any = "exact") -> SDI:
        model = SimpleNamespace(schedule=self.schedule, denoiser=denoiser)
        return SDI(model, GuidanceConfig(static=static, speed=speed))

    def denoiser(self, name: str) -> Any:
        if "fast" in name or speed_of(name) != "exact":
            return make_denoiser(self.half, "fast")
        unet = self.half
        if "nhwc" in name or "compile" in name:
            unet = copy.deepcopy(unet).to(memory_format=torch.channels_last)
        made = Denoiser(unet)
        if "compile" in name:
            made.unet = torch.compile(unet, dynamic=False)
        return made


def speed_of(name: str) -> str:
    """config.SPEEDS' name of a candidate."""
    last = name.rpartition("-")[2]
    return last if last in SPEEDS else "exact"


def relative(a: Tensor, b: Tensor) -> float:
    error = float((a.double() - b.double()).norm() / b.double().norm())
    return error if error == error else float("inf")


def one_call_ms(denoiser: Any, case: Case) -> float:
    """One call of the UNet for all conditions, captured."""
    unet, k = ConditionedUNet(denoiser), case.condition.n_conditions
    with torch.no_grad():
        cache = unet.prepare(case.condition.embeddings)
    t = case.t.cuda()
    replay = captured(lambda: unet.predict(case.z, t, cache, k))
    return compare([("call", replay)], rounds=10, warmup=3)[0].median_ms


def guided_steps(quick: bool) -> dict[str, float]:
    """Microseconds of one guided step in a graph of 100, by backend and dtype of the outputs."""
    levels, n = sd_schedule().levels, 100
    t, t_next = (torch.tensor([i]).cuda() for i in (101, 201))
    x, weights = torch.randn(1, 4, 64, 64).cuda(), torch.tensor([[-0.7, -1.6]]).cuda()
    rng, spec = torch.tensor([1, 0]).cuda(), StepSpec(-7.5, False, False, 0.3)
    found = {}
    for dtype in (torch.float16, torch.float32):
        outputs = torch.randn(4, 1, 4, 64, 64).cuda().to(dtype)
        for backend in ("cuda", "triton", "reference"):

            def steps(outputs: Tensor = outputs, backend: str = backend) -> Tensor:
                y = x
                for draw in range(n):
                    y, _ = guided_step(
                        outputs, y, levels, t, t_next, weights, spec,
                        rng=rng, draw=draw, backend=backend,
                    )  # fmt: skip
                return y

            with contextlib.suppress(ValueError):  # a backend that is not there
                replay = captured(steps)
                timing = compare([("", replay)], rounds=5 if quick else 20, warmup=3)[0]
                found[f"{backend} {str(dtype).removeprefix('torch.')}"] = timing.median_ms * 1e3 / n
    return found


def measure(args: Args, models: Models, t: int, sdis: dict[str, SDI]) -> dict[str, Any]:
    case = Case(args.batch, t, models.schedule)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    exact = case.target(models.sdi(Denoiser(models.exact), static=False))
    torch.backends.cudnn.allow_tf32 = before
    facts: dict[str, dict[str, float]] = {}
    calls: list[tuple[str, Callable[[], Any]]] = []
    for name, sdi in list(sdis.items()):
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            error = relative(case.target(sdi), exact)
        except Exception as reason:  # a peer that cannot be compiled here is no reason to stop
            if name in ("eager", "static", "static-fast") or speed_of(name) != "exact":
                raise
            print(f"  {name}: left out: {type(reason).__name__}: {str(reason).splitlines()[0]}")
            del sdis[name]
            continue
        peak = torch.cuda.max_memory_allocated() - held
        facts[name] = {"error": error, "extra_mib": peak / 2**20}
        if sdi._graphs:
            facts[name]["replay_error"] = sdi._graphs[0].check(tolerance=1e-2)
        calls.append((name, lambda sdi=sdi: case.target(sdi)))  # type: ignore[misc]
        allowed = ERROR_FACTOR * facts["eager"]["error"]
        if "compile" not in name and speed_of(name) == "exact" and not error <= allowed:
            raise AssertionError(f"{name}: t = {t}: error {error:.2e}, allowed {allowed:.1e}")
    timings: list[Timing] = compare(calls, rounds=3 if args.quick else args.rounds, warmup=2)
    for timing in timings:
        fact = facts[timing.name]
        call_ms = one_call_ms(sdis[timing.name].model.denoiser, case)
        config = sdis[timing.name].config
        n_calls = n_unet_calls(models.schedule, t, config)
        work = target_work(plan_calls(n_calls - 1, 4, config.shortcuts))
        tflop = TFLOP_A_SAMPLE * 4 * args.batch * work
        fact |= {
            "work": work,
            "ms": timing.median_ms,
            "call_ms": call_ms,
            "calls": timing.median_ms / call_ms,
            "tflops": tflop / timing.median_ms * 1e3,
        }
        print(f"  t = {t}, {n_calls} calls, {timing.name}: {fact}")
    rounded = {n: {k: float(f"{v:.4g}") for k, v in f.items()} for n, f in facts.items()}
    return {"n_calls": case.n_calls, "candidates": rounded, "timings": timings}


def main(args: Args) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench_invert.py: expected a CUDA device, found none")
    extra: dict[str, Any] = {"batch": args.batch}
    if args.steps:
        extra["guided_step_us"] = {
            k: float(f"{v:.3g}") for k, v in guided_steps(args.quick).items()
        }
        print(f"  guided step, us: {extra['guided_step_us']}")
    models = Models()
    sdis: dict[str, SDI] = {}
    for name in CANDIDATES:
        if name != "eager" and name not in args.only:
            continue
        try:
            static = name.startswith("static")
            sdis[name] = models.sdi(models.denoiser(name), static, speed_of(name))
        except RuntimeError as reason:
            print(f"  {name}: left out: {reason}")
    timings: list[Timing] = []
    with cudnn_benchmark():
        for t in (250,) if args.quick else args.t:
            found = measure(args, models, t, sdis)
            timings += [
                dataclasses.replace(row, name=f"{row.name}, t = {t}")
                for row in found.pop("timings")
            ]
            extra[f"t_{t}"] = found
    report(args.name, timings, extra)


if __name__ == "__main__":
    main(tyro.cli(Args))
