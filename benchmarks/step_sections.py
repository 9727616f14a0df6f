"""The sections of bench_step.py; each takes its Bench and returns what is stored."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from baseline import STAGES
from step_picture import draw_bars
from step_stages import measure_stages
from step_trace import busy_ms, idle_share, save_trace

from sdi_fast.bench.timing import N_WARM_UP, StepTiming, read, time_steps, time_workload, timed
from sdi_fast.bench.workload import all_levels, frozen, still
from sdi_fast.config import Config
from sdi_fast.engine import Engine

N_IDLE = {"exact": 200, "turbo": 200}
IDLE_WINDOW, TRACE_STEPS = 25, 3
N_REAL = {"baseline": 8}  # others: 64
BASE_ROUNDS, BASE_PATH = 4, 10
SCALING_T = 615
RESOLUTIONS, VIEWS, RAY_SAMPLES = (64, 128, 256, 512, 1024), (1, 2, 4), (128, 256, 512, 1024, 2048)
PROMPTS = (1, 2, 4)  # at a time, a step each in turn
REPEATED_STEPS = 4  # of the two deterministic runs that are compared


def stepper(engine: Any) -> Callable[[int | None], Any]:
    return lambda t: engine.step(t=t)


# ---- steps --------------------------------------------------------------------------------------


def steps(bench: Any) -> dict[str, Any]:
    """Each candidate at each t and over the annealing, peak memory, samples."""
    names = bench.names()
    found = bench.each("steps", names, lambda name: _steps_of(bench, name))
    base = _medians(found.get("baseline"))
    for name in found:
        own = _medians(found[name])
        found[name]["speed_up"] = {t: base[t] / own[t] for t in own if t in base}
        print(f"  {name}: speed-up over the baseline: {found[name]['speed_up']}")
    return {"candidates": found, "unit": "ms a step, median over rounds"}


def _steps_of(bench: Any, name: str) -> dict[str, Any]:
    is_base, rounds = name == "baseline", bench.args.rounds
    path = bench.workload.annealing()
    if is_base:  # it takes a second a step
        rounds, path = min(rounds, BASE_ROUNDS), path[:: max(len(path) // BASE_PATH, 1)]
    built = bench.built(name)
    built.memory.forget_peak()
    begin = time.perf_counter()
    engine = bench.engine(name, still(bench.config(name)))
    step = stepper(engine)
    step(bench.workload.t_steps[0])
    first = time.perf_counter() - begin
    warmup = 1 if is_base or bench.args.quick else N_WARM_UP
    timings = time_workload(
        step,
        bench.workload.t_steps,
        path,
        bench.device,
        rounds=rounds,
        path_rounds=1 if is_base else min(rounds, 3),
        warmup=warmup,
        warm_path=not is_base and bench.device.type == "cuda",
    )
    _tell(name, timings)
    memory = built.memory.peak()
    print(f"  {name}: {memory}, first step after {first:.1f} s")
    rows = [dataclasses.asdict(timing) for timing in timings]
    return {"timings": rows, **memory, "first_step_seconds": first}


def _tell(name: str, timings: list[StepTiming]) -> None:
    for timing in timings:
        level = "annealing" if timing.t is None else f"t = {timing.t}"
        print(
            f"  {name:10} {level:10} {timing.median_ms:9.2f} ms ({timing.low_ms:.2f} to "
            f"{timing.high_ms:.2f}, {timing.rounds} x {timing.steps_a_round}), "
            f"{timing.n_samples / 1e6:.3f} M samples, {timing.n_unet_calls:.1f} UNet calls"
        )


def _medians(found: dict[str, Any] | None) -> dict[str, float]:
    rows = found["timings"] if found else []
    return {"annealing" if r["t"] is None else str(r["t"]): r["median_ms"] for r in rows}


# ---- breakdown ----------------------------------------------------------------------------------


def breakdown(bench: Any) -> dict[str, Any]:
    """Milliseconds by stage, and their sum beside the whole step; a picture at the middle t."""
    found = bench.each("breakdown", bench.names(), lambda name: _breakdown_of(bench, name))
    middle = bench.workload.t_steps[len(bench.workload.t_steps) // 2]
    bars = {name: f["stages_ms"][str(middle)] for name, f in found.items()
            if str(middle) in f["stages_ms"]}  # fmt: skip
    if bars:
        where = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
        title = f"ms of a step by stage, t = {middle}, {bench.workload.name}, {where}"
        draw_bars(bench.picture, bars, title)
        print(f"  wrote {bench.picture}")
    how = (
        "ours: union of the kernels' intervals of each stage run alone; baseline: time on its "
        "stream between the stages' ends, gaps included; whole_busy: the union in whole steps"
    )
    return {"candidates": found, "how": how}


def _breakdown_of(bench: Any, name: str) -> dict[str, Any]:
    engine = bench.engine(name, still(bench.config(name)))
    t_steps, calls = bench.workload.t_steps, 1 if bench.args.quick else 3
    whole = {str(t): _whole(bench, engine, name, t, calls) for t in t_steps}
    if name == "baseline":
        runs = {t: [engine.step(t=t)["stages"] for _ in range(calls)] for t in t_steps}
        found: dict[str, Any] = {
            "stages_ms": {
                str(t): {s: statistics.median(r[s] for r in rows) for s in STAGES}
                for t, rows in runs.items()
            }
        }
    else:
        found = measure_stages(engine, t_steps, calls)
    for t, stages in found["stages_ms"].items():
        total = sum(stages.values())
        whole[t]["sum_of_stages_ms"] = total
        print(f"  {name}, t = {t}: {total:.2f} ms in stages; whole step: {whole[t]}")
        print("".join(f"    {s:26}{ms:10.3f} ms {ms / total:6.1%}\n" for s, ms in stages.items()))
    return {**found, "whole": whole}


def _whole(bench: Any, engine: Any, name: str, t: int, calls: int) -> dict[str, float]:
    """Wall time and, on a GPU, time with kernels, of whole steps."""
    step = stepper(engine)
    warmup = 1 if name == "baseline" or bench.args.quick else N_WARM_UP
    wall = time_steps(step, t, bench.device, rounds=calls, warmup=warmup).median_ms
    if bench.device.type != "cuda":
        return {"wall_ms": wall}
    busy, kernels = busy_ms(lambda: step(t), calls)
    return {"wall_ms": wall, "busy_ms": busy, "kernels": kernels}


# ---- idle ---------------------------------------------------------------------------------------


def idle(bench: Any) -> dict[str, Any]:
    """Share of the time in which the GPU does nothing, over the annealing, random cameras."""
    if bench.device.type != "cuda":
        return {"skipped": "needs a CUDA device"}
    return bench.each("idle", bench.names(tuple(N_IDLE)), lambda name: _idle_of(bench, name))


def _idle_of(bench: Any, name: str) -> dict[str, Any]:
    engine = bench.engine(name, frozen(all_levels(bench.config(name))))
    n = min(N_IDLE[name], 6) if bench.args.quick else N_IDLE[name]
    path = [round(980 + (250 - 980) * i / (n - 1)) for i in range(n)]
    step = stepper(engine)
    timed([lambda t=t: step(t) for t in path[:: max(n // 40, 1)]], bench.device)
    plain, _ = timed([lambda t=t: step(t) for t in path], bench.device)
    found, kernels = idle_share(step, path, IDLE_WINDOW, TRACE_STEPS)
    found["wall_ms_unprofiled"] = plain / n * 1e3
    # the profiler makes kernels of a graph a little longer and hides short gaps between them
    found["idle_share_unprofiled"] = 1.0 - found["busy_ms"] / found["wall_ms_unprofiled"]
    if name == "exact":
        label = f"{name}, last {TRACE_STEPS} steps"
        found["trace_kernels"] = save_trace(bench.trace, kernels, label)
        print(f"  wrote {bench.trace}")
    print(f"  {name}: {found}")
    return found


# ---- real ---------------------------------------------------------------------------------------


def real(bench: Any) -> dict[str, Any]:
    """The official run's first steps: its cameras, schedules and learning rates, 8 levels."""
    return bench.each("real", bench.names(), lambda name: _real_of(bench, name))


def _real_of(bench: Any, name: str) -> dict[str, Any]:
    engine = bench.engine(name, bench.config(name))
    n = 1 if bench.args.quick else N_REAL.get(name, 64)
    step = stepper(engine)
    timed([lambda: step(None)] * (1 if bench.args.quick else N_WARM_UP), bench.device)
    seconds, results = timed([lambda: step(None)] * n, bench.device)
    samples = statistics.fmean(read(r, "n_samples") for r in results)
    found = {"steps": n, "ms": seconds / n * 1e3, "n_samples": samples,
             "loss": read(results[-1], "loss")}  # fmt: skip
    print(f"  {name}: {found}")
    return found


# ---- scaling ------------------------------------------------------------------------------------


def scaling(bench: Any) -> dict[str, Any]:
    """Time, memory and the largest stage of our exact step by resolution, views, samples and
    prompts at a time."""
    name = "exact"
    if name not in bench.names() or not bench.check(name):
        return {"skipped": f"{name} is not among the candidates that passed their check"}
    quick, rows = bench.args.quick, []
    plans = [
        *(("resolution", n) for n in (RESOLUTIONS if not quick else (8,))),
        *(("views", n) for n in (VIEWS if not quick else (2,))),
        *(("prompts", n) for n in (PROMPTS if not quick else (2,))),
        *(("samples a ray", n) for n in (RAY_SAMPLES if not quick else (24,))),
    ]
    for what, n in plans:
        label = f"scaling: {what} {n}"
        if bench.is_late(label):
            continue
        config, prompts = _scaled(still(bench.config(name)), what, n), n if what == "prompts" else 1
        row = bench.guarded(label, lambda c=config, p=prompts: _scaling_row(bench, name, c, p))
        if row is not None:
            rows.append({"what": what, "n": n, **row})
            print(f"  {what} {n}: {row}")
    return {"candidate": name, "rows": rows}


def _scaled(config: Config, what: str, n: int) -> Config:
    camera, render = config.camera, config.render
    if what == "resolution":
        camera = dataclasses.replace(camera, height=n, width=n)
    elif what == "views":
        camera = dataclasses.replace(camera, batch_size=n)
    elif what == "samples a ray":
        render = dataclasses.replace(render, n_samples_per_ray=n)
    return dataclasses.replace(config, camera=camera, render=render)


def _scaling_row(bench: Any, name: str, config: Config, n_prompts: int) -> dict[str, Any]:
    """Of one step; several prompts take turns and share what those of `sdi-fast batch` do."""
    # a model keeps the graphs of its last shapes, which are other rows'
    built = bench.built(name, anew=True)
    built.memory.forget_peak()
    t = SCALING_T if not bench.args.quick else bench.workload.t_steps[0]
    engine = bench.engine(name, config)
    engines = [engine] + [
        Engine(
            dataclasses.replace(config, prompt=f"{config.prompt}, {i}"),
            pipeline=engine.pipeline,
            guidance=engine.guidance,
            home=engine.home,
        )
        for i in range(1, n_prompts)
    ]

    def turns(t: int | None) -> Any:
        return [each.step(t=t) for each in engines][0]

    rounds = min(bench.args.rounds, 5)
    warmup = 1 if bench.args.quick else N_WARM_UP
    timing = time_steps(turns, t, bench.device, rounds=rounds, warmup=warmup)
    memory = built.memory.peak()
    del engines[1:]
    found = measure_stages(engine, (t,), 1 if bench.args.quick else 2)
    stages = found["stages_ms"].get(str(t), {})
    bound = max(stages, key=lambda stage: stages[stage]) if stages else ""
    return {
        "ms": timing.median_ms / n_prompts,
        "n_samples": timing.n_samples,
        **memory,
        "bound_by": bound,
        "its_share": stages[bound] / sum(stages.values()) if bound else 0.0,
        **found,
    }


# ---- deterministic ------------------------------------------------------------------------------


def deterministic(bench: Any) -> dict[str, Any]:
    """What engine.deterministic costs the exact step, by backend; two runs' bits compared first."""
    name = "exact"
    backends = ("reference", "cuda" if bench.device.type == "cuda" else "cpu")
    found = {}
    for backend in backends:
        label = f"deterministic: {backend}"
        if not bench.is_late(label):
            row = bench.guarded(label, lambda b=backend: _deterministic_row(bench, name, b))
            if row is not None:
                found[backend] = row
                print(f"  {label}: {row}")
    return {"candidate": name, "backends": found}


def _deterministic_row(bench: Any, name: str, backend: Any) -> dict[str, Any]:
    built, config = bench.built(name), bench.config(name)
    engine = dataclasses.replace(config.engine, deterministic=True, backend=backend)
    config = dataclasses.replace(config, engine=engine)
    first, second = (_bits_of_a_run(bench, name, all_levels(config)) for _ in range(2))
    if first != second:
        raise RuntimeError(f"two runs of {REPEATED_STEPS} steps left different parameters")
    built.memory.forget_peak()
    step = stepper(bench.engine(name, still(config)))
    quick = bench.args.quick
    t, rounds = (bench.workload.t_steps[0], 1) if quick else (SCALING_T, 3)
    timing = time_steps(step, t, bench.device, rounds=rounds, warmup=1 if quick else N_WARM_UP)
    return {"t": t, "ms": timing.median_ms, "n_samples": timing.n_samples, **built.memory.peak(),
            "equal_bits_after_steps": REPEATED_STEPS}  # fmt: skip


def _bits_of_a_run(bench: Any, name: str, config: Config) -> str:
    """A digest of the parameters after some steps."""
    engine = bench.engine(name, config)
    engine.run(until=REPEATED_STEPS)
    digest = hashlib.sha256()
    for tensor in (*engine.field.state_dict().values(), *engine.background.state_dict().values()):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- long ---------------------------------------------------------------------------------------


def long(bench: Any) -> dict[str, Any]:
    """A run of 1,000 steps: real cameras, schedules (all shortened) and learning rates."""
    names = bench.names(("exact", "turbo"))
    return bench.each("long", names, lambda name: _long_of(bench, name))


def _long_of(bench: Any, name: str) -> dict[str, Any]:
    built = bench.built(name)
    built.memory.forget_peak()
    n, official_steps = bench.args.long_steps, bench.config(name).engine.max_steps
    engine = bench.engine(name, bench.config(name).with_steps(n))
    chunk, marks = max(n // 100, 1), [(0, 0.0)]
    begin = time.perf_counter()
    try:
        while engine.global_step < n and bench.seconds_left() > 0:
            engine.run(until=min(engine.global_step + chunk, n))
            _wait(bench.device)
            marks.append((engine.global_step, round(time.perf_counter() - begin, 3)))
    except Exception as error:  # such as a run that diverged, which random weights may make it
        bench.left_out[f"long: {name}: the rest"] = f"{type(error).__name__}: {error}"[:200]
    _wait(bench.device)
    seconds, done = time.perf_counter() - begin, engine.global_step
    history = engine.history[:done]
    found = {
        "steps": done,
        "seconds": seconds,
        "mean_ms": seconds / max(done, 1) * 1e3,
        "steady_ms": _steady_ms(marks),
        "marks": marks,  # (steps, seconds)
        "n_samples": statistics.fmean(float(row["n_samples"]) for row in history),
        "skipped": sum(bool(row["skipped"]) for row in history),
        "loss_first": float(history[0]["loss"]),
        "loss_last": float(history[-1]["loss"]),
        **built.memory.peak(),
    }
    for mean in ("mean_ms", "steady_ms"):
        found[f"hours_of_{official_steps}_from_{mean}"] = found[mean] * official_steps / 3.6e6
    print(f"  {name}: { ({k: v for k, v in found.items() if k != 'marks'}) }")
    return found


def _steady_ms(marks: list[tuple[int, float]], parts: int = 10) -> float:
    """Mean step without compilations and captures, which a long run has as often as a short one:
    the mean over the run's tenths of their median stretch."""
    stretches = [
        (s1 - s0) / (n1 - n0) * 1e3 for (n0, s0), (n1, s1) in zip(marks, marks[1:], strict=False)
    ]
    size = -(-len(stretches) // parts) or 1
    tenths = [stretches[i : i + size] for i in range(0, len(stretches), size)]
    return statistics.fmean(statistics.median(tenth) for tenth in tenths) if tenths else 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
