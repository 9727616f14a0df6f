"""The engine on a GPU: CUDA graphs, no waiting for the host, and how runs that go wrong end."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdi_fast.api import generate_batch
from sdi_fast.camera import orbit_cameras
from sdi_fast.config import Config, toyworld_config
from sdi_fast.config_io import config_from_dict
from sdi_fast.constants import MAX_BAD_STEPS
from sdi_fast.diffusion.pipeline import Pipeline, load_pipeline
from sdi_fast.engine import STEPS_AHEAD, Engine, NonFiniteError
from sdi_fast.reference.philox import philox_normal
from sdi_fast.types import SDIFastError

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

CONFIG = dataclasses.replace(toyworld_config(), prompt="a red mushroom")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load_pipeline(CONFIG.model, "cuda")


@pytest.fixture(scope="module")
def exact_pipeline() -> Pipeline:
    """diffusers' modules in f32."""
    model = dataclasses.replace(
        CONFIG.model, dtype="float32", denoiser="diffusers", encoder="diffusers"
    )
    return load_pipeline(model, "cuda")


def engine_of(pipeline: Pipeline, **stages: dict[str, Any]) -> Engine:
    return Engine(config_from_dict(stages, CONFIG), pipeline=pipeline)


def parameters(engine: Engine) -> Tensor:
    return torch.cat([p.detach().flatten() for p in engine.optimizer.parameters()]).cpu()


def views(engine: Engine) -> Tensor:
    return engine.render(orbit_cameras(CONFIG.camera, 4)).comp_rgb.double().cpu()


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- graphs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shading_from", [0, 1000], ids=["all shadings", "albedo"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_replayed_step_does_what_its_kernels_do(
    pipeline: Pipeline, shading_from: int, batch: int
) -> None:
    """From one state, step by step, captured and not; a graph that lost a kernel would differ."""
    stages: dict[str, dict[str, Any]] = {
        "render": {
            "ambient_only_steps": shading_from,
            "albedo_prob": 0.4,
            "textureless_prob": 0.3,
            "occupancy_every": 4,
        },
        "camera": {"batch_size": batch},
    }
    graphs = engine_of(pipeline, **stages)
    plain = engine_of(pipeline, **stages, engine={"graphs": False})
    assert graphs.graphs is not None and plain.graphs is None
    assert plain.ran["renderer"] == graphs.ran["renderer"] == "fused"
    for _ in range(16):
        state = graphs.state_tensors()
        plain.load_state_tensors(state)
        one, other = graphs.step(), plain.step()
        assert not one.skipped and one.t == other.t and one.n_unet_calls == other.n_unet_calls
        assert one.n_samples == other.n_samples > 0
        assert one.loss == pytest.approx(other.loss, rel=2e-3)
        for name, value in other.losses.items():
            assert one.losses[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name
        before = torch.cat([v.flatten() for k, v in state.items() if "exp_avg." in k])
        moments = [
            torch.cat([v.flatten() for k, v in e.state_tensors().items() if "exp_avg." in k])
            for e in (graphs, plain)
        ]
        # the first moment holds the gradient: f16 rounding and the order of atomics
        assert distance(moments[0] - 0.9 * before, moments[1] - 0.9 * before) < 2e-2
    assert graphs.graphs.n_kinds >= (2 if shading_from == 0 else 1)


def test_steps_do_not_wait_for_the_gpu(pipeline: Pipeline) -> None:
    """Occupancy updates, draws and graphs included; after everything has been captured."""
    engine = engine_of(
        pipeline, render={"occupancy_every": 2, "occupancy_warmup": 4, "ambient_only_steps": 0}
    )
    engine.run(until=60)
    kinds = engine.graphs.n_kinds if engine.graphs else 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.graphs is not None and engine.graphs.n_kinds == kinds == 3
    assert engine.bad_steps == 0 and len(engine.history) == 70


def test_the_host_is_a_bounded_number_of_steps_ahead(pipeline: Pipeline) -> None:
    engine = engine_of(pipeline)
    engine.run(until=20)
    metrics = [engine.step() for _ in range(8)]
    waiting = sum(not m.ready for m in metrics)
    assert waiting <= STEPS_AHEAD
    assert [m.step for m in metrics] == list(range(20, 28))
    assert metrics[0].loss == engine.history[20]["loss"]
    assert all(m.ready for m in metrics)


def test_a_checkpoint_goes_on_as_the_run_would(pipeline: Pipeline) -> None:
    """The same draws; values differ by the order of atomic additions."""
    engine = engine_of(pipeline)
    engine.run(until=12)
    later = engine_of(pipeline)
    later.load_state_tensors(engine.snapshot().tensors())
    assert torch.equal(parameters(later), parameters(engine))
    engine.run(until=16)
    later.run(until=16)
    assert later.history[:12] == engine.history[:12]
    for a, b in zip(later.history[12:], engine.history[12:], strict=True):
        assert a["t"] == b["t"] and a["loss"] == pytest.approx(b["loss"], rel=0.05)
    assert torch.equal(later.generator.get_state(), engine.generator.get_state())
    assert torch.equal(later.noise.get_state(), engine.noise.get_state())


def test_engines_can_share_their_memory(pipeline: Pipeline) -> None:
    """Two runs in turn, in one pool with one guidance, give what each gives alone."""
    alone = [engine_of(pipeline, engine={"seed": s}) for s in (0, 1)]
    for engine in alone:
        engine.run(until=10)
    first = engine_of(pipeline)
    config = config_from_dict({"engine": {"seed": 1}}, CONFIG)
    both = [first, Engine(config, pipeline=pipeline, guidance=first.guidance, home=first.home)]
    for _ in range(10):
        for engine in both:
            engine.step()
    for engine, expected in zip(both, alone, strict=True):
        for a, b in zip(engine.history, expected.history, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=0.05)


def test_a_home_outlives_its_engines(pipeline: Pipeline) -> None:
    """A pool without graphs could not be captured into again."""
    home = None
    for seed in range(3):
        config = config_from_dict({"engine": {"seed": seed}}, CONFIG)
        engine = Engine(config, pipeline=pipeline, home=home)
        home = engine.home
        engine.run(until=6)
        assert engine.bad_steps == 0 and engine.graphs is not None and engine.graphs.n_kinds == 1
        del engine
        gc.collect()
        torch.cuda.empty_cache()


def test_assets_in_turns_and_after_each_other(tmp_path: Path) -> None:
    """Three assets at two places: the third one comes into memory that others have left."""
    configs = [
        config_from_dict(
            {"prompt": prompt, "export": {"turntable_frames": 2, "mesh_resolution": 24}}, CONFIG
        ).with_steps(8)
        for prompt in ("a red mushroom", "a blue house", "a green car")
    ]
    items = generate_batch(configs, out=tmp_path, per_gpu=2)
    assert [(item.status, item.error) for item in items] == [("done", "")] * 3
    for item in items:
        assert item.result is not None and item.result.metrics["ran"]["graphs"]
        assert len(item.result.metrics["history"]) == 8


# ---- against the reference engine ---------------------------------------------------------------


class SameNoise:
    """An SDI guidance without graphs that draws the inversion's noise as InversionGraphs do."""

    def __init__(self, sdi: Any) -> None:
        self.sdi = sdi
        self.loss = sdi.loss

    def target(self, latents: Tensor, condition: Any, t: Tensor, generator: Any, *, delta: Tensor):
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device="cuda")
        rng = torch.cat([seed, torch.zeros_like(seed)])
        n, size = self.sdi.config.inversion_n_steps + 2, latents[0].numel()
        noise = [philox_normal(rng, i, len(latents), size) for i in range(n)]
        shaped = torch.stack(noise).view(n, *latents.shape).to(latents.dtype)
        from sdi_fast.diffusion.invert import plan_inversion

        plan = plan_inversion(self.sdi.model.schedule, t.tolist(), delta.tolist(), self.sdi.config)
        n_steps = max(plan.lengths)
        return self.sdi.target(latents, condition, t, None, delta=delta, eta_noise=shaped[:n_steps])


def reference_engine(pipeline: Pipeline, **stages: dict[str, Any]) -> Engine:
    """PyTorch's ops, f32, diffusers' modules, no graphs; the noise of the fast one."""
    engine = engine_of(
        pipeline,
        guidance={"static": False},
        render={"precision": "fp32", **stages.pop("render", {})},
        engine={"backend": "reference", "graphs": False, **stages.pop("engine", {})},
        **stages,
    )
    same = SameNoise(engine.guidance)
    engine.guidance = engine.halves.guidance = same  # type: ignore[assignment]
    return engine


# Twice (style.md 4) how far a reference whose UNet and VAE are in f16 is from one in f32 after 50
# steps: views 0.0006 to 0.007, change 0.03 to 0.145, in eleven runs on the H200 and a CPU, of which
# one had a change of 0.29. Such runs drift apart chaotically: comparing with a single one of them
# made this test fail now and then. Other noise makes 0.023 to 0.037 and 0.36 to 0.43 (four runs).
F16_DRIFT = {"views": 0.014, "change": 0.29}


def test_fifty_steps_follow_the_reference_engine(
    pipeline: Pipeline, exact_pipeline: Pipeline
) -> None:
    """Same seeds and noise. The measure: how far the views, and the parameters' change, after 50
    steps are from the reference's. A run of other noise has to be farther away."""
    engines = {
        "exact": reference_engine(exact_pipeline),
        "fast": engine_of(pipeline),
        "other noise": engine_of(pipeline),
    }
    engines["other noise"].noise.manual_seed(1)
    start = {name: parameters(engine) for name, engine in engines.items()}
    assert all(torch.equal(value, start["exact"]) for value in start.values())
    for engine in engines.values():
        engine.run(until=50)
        assert not any(row["skipped"] for row in engine.history)
    rows = {name: engine.history for name, engine in engines.items()}
    assert [r["t"] for r in rows["fast"]] == [r["t"] for r in rows["exact"]]
    assert rows["fast"][0]["loss"] == pytest.approx(rows["exact"][0]["loss"], rel=1e-2)
    images = {name: views(engine) for name, engine in engines.items()}
    changes = {name: parameters(engine) - start[name] for name, engine in engines.items()}
    for name, values in (("views", images), ("change", changes)):
        ours, other = (distance(values[k], values["exact"]) for k in ("fast", "other noise"))
        print(f"{name}: {ours:.4f} from the reference, with other noise {other:.4f}")
        assert ours <= F16_DRIFT[name] and ours < other, name


# ---- what goes wrong ----------------------------------------------------------------------------


def spoil_render(engine: Engine) -> None:
    engine.buffers.jitter.fill_(0.0)
    with torch.no_grad():
        engine.background.w1.fill_(float("nan"))


def spoil_unet(engine: Engine) -> None:
    engine.prompts.views.fill_(float("nan"))


def spoil_gradient(engine: Engine) -> None:
    """A finite loss whose gradient overflows."""
    original = engine.guidance.loss

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * float("inf")

    engine.guidance.loss = lambda *args: Overflow.apply(original(*args))  # type: ignore


@pytest.mark.parametrize("spoil", [spoil_render, spoil_unet, spoil_gradient])
@pytest.mark.parametrize("graphs", [None, False])
def test_steps_that_are_not_finite_change_nothing_and_end_the_run(
    spoil: Any, graphs: bool | None
) -> None:
    own = load_pipeline(CONFIG.model, "cuda")
    engine = engine_of(own, engine={"graphs": graphs})
    if spoil is spoil_gradient:
        spoil(engine)
    else:
        engine.run(until=6)
        assert engine.bad_steps == 0
        spoil(engine)
    begun = engine.global_step
    before = parameters(engine)
    with pytest.raises(NonFiniteError, match=f"in {MAX_BAD_STEPS} steps in a row"):
        engine.run(until=begun + 40)
    assert engine.global_step == begun + MAX_BAD_STEPS
    assert torch.equal(torch.nan_to_num(parameters(engine)), torch.nan_to_num(before))
    assert engine.optimizer.n_steps == begun
    assert all(row["skipped"] for row in engine.history[begun:])


def test_one_bad_step_is_skipped_and_the_run_goes_on(pipeline: Pipeline) -> None:
    engine = engine_of(pipeline)
    engine.run(until=6)
    views_before = engine.prompts.views.clone()
    engine.prompts.views.fill_(float("nan"))
    bad = engine.step()
    assert bad.skipped and bad.bad_steps == 1
    engine.prompts.views.copy_(views_before)
    assert not engine.step().skipped and engine.bad_steps == 0
    assert engine.optimizer.n_steps == 7


def test_an_empty_volume_has_finite_zero_losses(pipeline: Pipeline) -> None:
    engine = engine_of(pipeline, render={"occupancy_every": 1000})
    engine.run(until=4)
    engine.occupancy.binary.zero_()
    for _ in range(3):
        metrics = engine.step()
        assert metrics.n_samples == 0 and not metrics.skipped
        assert metrics.losses["convex"] == metrics.losses["z_variance"] == 0.0
    assert bool(torch.isfinite(parameters(engine)).all())


def test_a_volume_full_of_samples_is_rendered_whole(pipeline: Pipeline) -> None:
    """No buffer of samples can overflow: a fog that no ray gets out of, and none is opaque in."""
    stages: dict[str, Any] = {
        "render": {"occupancy_every": 1000, "alpha_threshold": 0.0, "n_samples_per_ray": 1024},
        "field": {"blob_scale": 0.001},
    }
    engine = engine_of(pipeline, **stages)
    metrics = [engine.step() for _ in range(4)]
    assert not any(m.skipped for m in metrics)
    camera = orbit_cameras(CONFIG.camera, 2)
    fused = engine.render(camera)
    precise = engine_of(
        pipeline, **{**stages, "render": {**stages["render"], "precision": "fp32"}},
        engine={"backend": "reference"},
    )  # fmt: skip
    precise.load_state_tensors(engine.state_tensors())
    expected = precise.render(camera)
    n = int(expected.n_samples)
    assert abs(int(fused.n_samples) - n) <= 1e-4 * n and n > 100 * camera.height * camera.width
    assert distance(fused.comp_rgb, expected.comp_rgb) < 2e-3


@pytest.fixture
def little_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_too_little_memory_says_what_to_lower(
    little_memory: None, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdi_fast.cli import main

    code = main(
        ["generate", "a red mushroom", "--model", "toyworld", "--steps", "4", "--size", "4096",
         "--out", str(tmp_path / "run"), "--quiet"]
    )  # fmt: skip
    assert code == 1
    error = capsys.readouterr().err
    assert "memory" in error and "--size" in error and "Traceback" not in error
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# ---- deterministic ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_deterministic_runs_repeat_every_bit_resumed_or_not(
    pipeline: Pipeline, backend: str
) -> None:
    """With the fused renderer in graphs, and with PyTorch's ops."""

    def run(until: int, state: dict[str, Tensor] | None = None) -> Engine:
        engine = engine_of(
            load_pipeline(CONFIG.model, "cuda"),
            engine={"deterministic": True, "backend": backend},
            render={"ambient_only_steps": 4, "occupancy_every": 4},
        )
        assert (engine.graphs is not None) == (backend == "auto")
        if state is not None:
            engine.load_state_tensors(state)
        engine.run(until=until)
        return engine

    first, second = run(16), run(16)
    resumed = run(16, run(7).state_tensors())
    for other in (second, resumed):
        a, b = first.state_tensors(), other.state_tensors()
        for name, value in a.items():
            if name != "engine.history":  # it holds seconds
                assert torch.equal(value, b[name]), name


def test_the_config_decides_what_is_captured(pipeline: Pipeline) -> None:
    config: Config = engine_of(pipeline).config
    assert config.engine.graphs is None
    assert engine_of(pipeline, render={"precision": "fp32"}).graphs is None
    assert engine_of(pipeline, engine={"deterministic": True}).backend == "cuda"
    in_pytorch = engine_of(pipeline, engine={"deterministic": True}, render={"precision": "fp32"})
    assert in_pytorch.backend == "reference" and in_pytorch.graphs is None
    with pytest.raises(SDIFastError, match="deterministic: the single CUDA ops"):
        engine_of(
            pipeline,
            engine={"deterministic": True, "backend": "cuda"},
            render={"precision": "fp32"},
        )
