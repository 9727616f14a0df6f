"""The fused CUDA renderer against its PyTorch twin and a nerfacc-style renderer.

    python benchmarks/bench_render.py [--size 512] [--samples 8000000] [--rounds 20] [--quick]

Scene: the official field with all 16 levels at its initial blob, one view from where about
`--samples` samples survive (of 512 x 512; in proportion at other sizes). Outputs and gradients of
each candidate are compared with the twin's before anything of it is timed; one that fails, or
that cannot be had, leaves a line that says so. Timed with the L2 cache emptied before each call,
in interleaved rounds. Without a CUDA device only the twin runs: a smoke test.

Writes <out>/render_<gpu>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ceilings import kernel_rows, limit_text, measure_ceilings, print_kernels
from harness import (
    RESULTS,
    capture,
    compare,
    gpu_slug,
    peak_memory,
    print_conditions,
    print_timings,
    relative_error,
    save,
)
from peers import NerfaccPeer, import_nerfacc, import_tinycudann
from render_scene import ERROR_FACTOR, STEP, Render, Scene, Truth
from torch import Tensor

from sdi_fast import reference
from sdi_fast.config import FieldConfig, RenderConfig
from sdi_fast.ops import render_views as fused_op
from sdi_fast.ops._native import reason_missing
from sdi_fast.render import Renderer
from sdi_fast.types import RenderOutput

FULL_SIZE = 512  # pixels a side, to which --samples refers
FUSED, TWIN, PEER = "fused", "twin", "nerfacc"
GRAPH = "Renderer, CUDA graph"
SWEEP = (100_000, 1_000_000, 8_000_000, 30_000_000, 100_000_000)
QUICK_SWEEP = (1_000, 2_000)
COMFORTABLE = 0.6  # of the free memory: what a candidate may be expected to take
GRAPH_TOLERANCE = 1e-5  # the same kernels: only the order of atomic additions differs
IMAGE_TOLERANCE = 2e-3  # f16 against f32: four roundings of 2^-11
IMAGES = ("comp_rgb", "opacity", "depth", "comp_normal")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=0, help="pixels a side; 512, quick: 16")
    parser.add_argument("--samples", type=int, default=8_000_000, help="kept, of 512 x 512")
    parser.add_argument("--rounds", type=int, default=0, help="timed calls; 20, quick: 2")
    parser.add_argument("--slow-ms", type=float, default=1000.0, help="above: every 4th round")
    parser.add_argument("--error-factor", type=float, default=ERROR_FACTOR)
    parser.add_argument("--shadings", nargs="+", default=["albedo", "diffuse"])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    args = parser.parse_args(argv)
    args.size = args.size or (16 if args.quick else FULL_SIZE)
    args.rounds = args.rounds or (2 if args.quick else 20)
    return args


class Bench:
    """The candidates and what was found out about them so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scene = Scene(args.device, FieldConfig(), RenderConfig())
        self.candidates: dict[str, Render] = {}
        self.missing: dict[str, str] = {}  # candidate: why it is not there
        self.failed = False  # whether something that was there failed
        self._find_candidates()
        fastest = self.candidates.get(FUSED, self.candidates[TWIN])
        self.samples = round(args.samples * (args.size / FULL_SIZE) ** 2)
        self.distance = self.scene.find_distance(fastest, args.size, self.samples)
        self.counts = self.counts_of(fastest)
        self.results: dict[str, Any] = {
            "size": args.size,
            "distance": self.distance,
            "samples_kept": self.counts[0],
            "samples_tried": self.counts[1],
            "error_factor": args.error_factor,
            "missing": self.missing,
        }

    def counts_of(self, render: Render) -> tuple[int, int]:
        with torch.no_grad():
            kept, tried = (int(n) for n in self.scene.render(render, "albedo").counts)
        return kept, tried

    def _find_candidates(self) -> None:
        """The twin first: speed-ups refer to it."""
        scene, on_gpu = self.scene, self.args.device.startswith("cuda")
        self.candidates[TWIN] = reference.render_views
        if on_gpu and fused_op.can_fuse(scene.field.spec, scene.camera.c2w.device):
            self.candidates[FUSED] = functools.partial(fused_op.render_views, backend="cuda")
        else:
            why = reason_missing() or "built without nvcc"
            self.missing[FUSED] = f"extension: {why}" if on_gpu else "needs a CUDA device"
        nerfacc, why = import_nerfacc() if on_gpu else (None, "nerfacc needs a CUDA device")
        if nerfacc is None:
            self.missing[PEER] = why
            return
        tinycudann, why = import_tinycudann()
        if tinycudann is None:
            self.missing["tinycudann"] = f"{why}; {PEER}'s hash grid is peers.HalfGrid"
        peer = NerfaccPeer(nerfacc, scene.field.spec, self.args.device, tinycudann)
        self.candidates[PEER] = peer.render_views

    def drop(self, name: str, why: str) -> None:
        self.missing[name], self.failed = why, True
        self.candidates.pop(name, None)
        print(f"  {name}: {why}")


def guarded(bench: Bench, name: str, function: Callable[[], Any]) -> Any:
    """function(); where it fails, out of memory say, the candidate is dropped: None."""
    try:
        return function()
    except Exception as error:
        traceback.print_exc()
        bench.drop(name, f"{type(error).__name__}: {error}".splitlines()[0][:200])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def check(bench: Bench, shading: str) -> dict[str, Any]:
    """Every candidate against the twin; those that fail are dropped."""
    scene, checks = bench.scene, {}
    truth = Truth.of(scene, bench.candidates[TWIN], shading, bench.args.error_factor)
    for name, render in list(bench.candidates.items()):
        if name == TWIN:
            continue
        found = guarded(bench, name, lambda r=render: truth.check(scene, r, shading))
        if found is None:
            continue
        checks[name] = found
        print(f"  {name} against the twin, {shading}; samples kept, tried: {found['counts']}")
        for what, error in found["errors"].items():
            print(f"    {what:18} {error:.2e} of {truth.allowed[what]:.2e} allowed")
        if found["failed"]:
            bench.drop(name, f"{shading}: check failed: {', '.join(found['failed'])}")
    return {"twin_counts": truth.counts, "candidates": checks}


def time_and_weigh(
    bench: Bench, functions: dict[str, Callable[[], Any]], rounds: int | None = None
) -> list[dict[str, Any]]:
    """Timings and peak memory of each function, as rows; printed."""
    args = bench.args
    # a replay allocates nothing: its graph's pool holds what the eager call takes
    memory = {name: peak_memory(f) for name, f in functions.items() if name != GRAPH}
    timings = compare(
        list(functions.items()),
        rounds=args.rounds if rounds is None else rounds,
        warmup=1 if args.quick else 3,
        cold_l2=True,
        slow_ms=args.slow_ms,
    )
    print_timings(timings)
    for name, peak in memory.items():
        print(f"{name:28}{peak / 2**20:11.0f} MiB beyond what was allocated before")
    return [{**dataclasses.asdict(t), "peak_bytes": memory.get(t.name)} for t in timings]


def bench_ops(bench: Bench) -> dict[str, Any]:
    """Forward, and forward + backward, of the ray sums."""
    scene, results = bench.scene, {}
    for shading in bench.args.shadings:
        checks = check(bench, shading)
        forward = {
            name: lambda r=render, s=shading: scene.render(r, s)
            for name, render in bench.candidates.items()
        }
        both = {
            name: lambda r=render, s=shading: scene.gradients(r, s)
            for name, render in bench.candidates.items()
        }
        print(f"{shading}, forward (recording for a backward)")
        rows = {"check": checks, "forward": time_and_weigh(bench, forward)}
        print(f"{shading}, forward + backward")
        results[shading] = {**rows, "forward_backward": time_and_weigh(bench, both)}
    return results


def whole_step(bench: Bench, shading: str, backend: str) -> Callable[[], tuple[Tensor, ...]]:
    """Renderer.render with background and images, a simple loss, all gradients."""
    scene = bench.scene
    renderer = Renderer(scene.field_config, scene.render_config, backend)
    parameters = [*scene.field.parameters(), *scene.background.parameters()]

    def step() -> tuple[Tensor, ...]:
        out: RenderOutput = renderer.render(
            scene.field,
            scene.background,
            scene.occupancy,
            scene.camera,
            STEP,
            shading,
        )
        loss = out.comp_rgb.square().mean() + out.opacity.mean() + out.z_variance.mean()
        loss = loss + out.comp_normal.square().mean() + out.orient.mean()
        grads = torch.autograd.grad(loss, parameters)
        return (*(getattr(out, name).detach() for name in IMAGES), loss.detach(), *grads)

    return step


def check_graph(bench: Bench, graph: Any, outputs: tuple[Tensor, ...], step: Any) -> float:
    """The largest error of a replay against the eager step, with parameters changed since."""
    weight = bench.scene.field.color_w2
    original = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    graph.replay()
    replayed = [t.clone() for t in outputs]
    worst = max(relative_error(r, e) for r, e in zip(replayed, step(), strict=True))
    with torch.no_grad():
        weight.copy_(original)
    if not worst <= GRAPH_TOLERANCE:
        raise AssertionError(f"replay: relative error {worst:.2e}, allowed {GRAPH_TOLERANCE:.0e}")
    return worst


def bench_whole(bench: Bench) -> dict[str, Any]:
    """Renderer.render: eager, and as a replayed CUDA graph."""
    results: dict[str, Any] = {}
    is_fused = FUSED in bench.candidates
    for shading in bench.args.shadings:
        twin = whole_step(bench, shading, "reference")
        functions: dict[str, Callable[[], Any]] = {"Renderer, twin ops": twin}
        errors: dict[str, float] = {}
        if is_fused:
            eager = whole_step(bench, shading, "auto")
            pairs = zip(IMAGES, eager(), twin(), strict=False)
            errors = {name: relative_error(a, b) for name, a, b in pairs}
            print(f"Renderer, {shading}: images against the twin ops: {errors}")
            if max(errors.values()) > IMAGE_TOLERANCE:
                bench.drop(f"Renderer, {shading}", "check failed")
                continue
            functions["Renderer, eager"] = eager
            made = guarded(bench, GRAPH, lambda e=eager: capture(e))
            if made is not None:
                graph, outputs = made
                worst = guarded(
                    bench,
                    GRAPH,
                    lambda g=graph, o=outputs, e=eager: check_graph(bench, g, o, e),
                )
                print(f"Renderer, {shading}: replay against eager: {worst}")
                if worst is not None:
                    errors["replay"] = worst
                    functions[GRAPH] = graph.replay
        print(f"Renderer.render, {shading}: forward + backward of a loss on the images")
        results[shading] = {"errors": errors, "timings": time_and_weigh(bench, functions)}
    return results


def bench_kernels(bench: Bench) -> dict[str, Any]:
    """Kernels of a forward + backward, and what this GPU could do at best."""
    if FUSED not in bench.candidates:
        return {}
    render, levels = bench.candidates[FUSED], bench.scene.field.active_levels(STEP)
    ceilings = measure_ceilings()
    print("measured ceilings:", {name: round(value, 1) for name, value in ceilings.items()})
    results: dict[str, Any] = {"ceilings": ceilings}
    for shading in bench.args.shadings:
        step = functools.partial(bench.scene.gradients, render, shading)
        print(f"kernels of {FUSED}, {shading}, forward + backward (warm L2)")
        results[shading] = kernel_rows(step, bench.counts, levels, ceilings)
        print_kernels(results[shading])
        whole = whole_step(bench, shading, "auto")
        print(f"kernels of Renderer.render, {shading}, forward + backward")
        results[f"Renderer, {shading}"] = kernel_rows(whole, bench.counts, levels, ceilings)
        print_kernels(results[f"Renderer, {shading}"])
    results["limits"] = limit_text(bench.counts, levels, ceilings)
    print(results["limits"])
    return results


def free_memory() -> float:
    """Bytes of the GPU that could be allocated; no bound without one."""
    if not torch.cuda.is_available():
        return float("inf")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def bench_sweep(bench: Bench) -> list[dict[str, Any]]:
    """Time and memory of forward + backward against the number of samples."""
    scene, args = bench.scene, bench.args
    per_view = bench.counts[0]
    bytes_per_sample = dict.fromkeys(bench.candidates, 0.0)  # of the last count that ran
    rows = []
    for target in QUICK_SWEEP if args.quick else SWEEP:
        views = max(1, round(target / per_view))
        size = round(args.size * (target / (per_view * views)) ** 0.5)
        scene.look(bench.distance, views, size)
        fastest = bench.candidates.get(FUSED, bench.candidates[TWIN])
        kept, tried = bench.counts_of(fastest)
        row = {"views": views, "size": size, "kept": kept, "tried": tried, "skipped": {}}
        free = free_memory()
        functions = {}
        for name, render in bench.candidates.items():
            expected = bytes_per_sample[name] * kept
            if expected > COMFORTABLE * free:
                row["skipped"][name] = f"would take about {expected / 2**30:.0f} GiB"
            else:
                functions[name] = lambda r=render: scene.gradients(r, "albedo")
        print(f"{kept / 1e6:.3f} M samples kept, {tried / 1e6:.3f} M tried: {views} x {size}^2")
        print("".join(f"  {name}: {why}\n" for name, why in row["skipped"].items()), end="")
        row["timings"] = time_and_weigh(bench, functions, rounds=max(args.rounds // 2, 2))
        for timing in row["timings"]:
            bytes_per_sample[timing["name"]] = timing["peak_bytes"] / max(kept, 1)
        rows.append(row)
    return rows


SECTIONS = {"ops": bench_ops, "whole": bench_whole, "kernels": bench_kernels, "sweep": bench_sweep}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    name = f"render_{gpu_slug() if on_gpu else 'cpu'}"
    print_conditions(name)
    bench = Bench(args)
    for key, value in bench.results.items():
        print(f"  {key}: {value}")
    for section in args.sections:
        # one that fails, out of memory say, leaves the others their turn
        bench.results[section] = guarded(bench, section, lambda s=section: SECTIONS[s](bench))
        path = save(name, bench.results, args.out)
    print(f"wrote {path}")
    print("".join(f"not measured: {name}: {why}\n" for name, why in bench.missing.items()), end="")
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
