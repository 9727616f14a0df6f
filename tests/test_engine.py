"""What the engine decides about devices; whole runs are in test_cli_runs.py."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import sdi_fast.engine
import sdi_fast.ops.render_views
from sdi_fast.camera import orbit_cameras
from sdi_fast.config import toyworld_config
from sdi_fast.config_io import config_from_dict
from sdi_fast.constants import MAX_BAD_STEPS
from sdi_fast.diffusion.pipeline import Pipeline, load_pipeline
from sdi_fast.engine import Engine, NonFiniteError
from sdi_fast.placement import choose_backend
from sdi_fast.types import Camera, SDIFastError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
REPEATS: dict[str, Any] = {"deterministic": True}


@pytest.mark.parametrize(
    ("engine", "stages", "device", "expected"),
    [
        ({}, {}, CUDA, "auto"),
        (REPEATS, {}, CPU, "auto"),  # the C++ ops repeat every bit
        (REPEATS, {}, CUDA, "cuda"),  # and so does the fused renderer
        (REPEATS, {"render": {"precision": "fp32"}}, CUDA, "reference"),
        (REPEATS, {"field": {"hidden": 32}}, CUDA, "reference"),
        (REPEATS | {"backend": "reference"}, {}, CUDA, "reference"),  # asked for by name
        (REPEATS | {"backend": "cuda"}, {"render": {"precision": "fp32"}}, CUDA, "cuda"),
        ({"backend": "reference"}, {}, CPU, "reference"),
    ],
)
def test_deterministic_runs_keep_away_from_atomics(
    engine: dict[str, Any], stages: dict[str, Any], device: torch.device, expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sdi_fast.ops.render_views, "has_cuda", lambda: True)
    config = config_from_dict({"engine": engine, **stages})
    assert choose_backend(config, device) == expected


def test_deterministic_runs_take_pytorch_where_no_kernels_were_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sdi_fast.ops.render_views, "has_cuda", lambda: False)
    assert choose_backend(config_from_dict({"engine": REPEATS}), CUDA) == "reference"


@pytest.mark.slow
def test_cameras_go_to_where_the_field_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Previews and turntables make theirs on the CPU."""
    engine = Engine(dataclasses.replace(toyworld_config(), prompt="a red mushroom"))
    moved = []

    def camera_to(camera: Camera, device: torch.device) -> Camera:
        moved.append(device)
        return camera

    monkeypatch.setattr(sdi_fast.engine, "camera_to", camera_to)
    engine.render(orbit_cameras(engine.config.camera, 1, height=4, width=4))
    assert moved == [engine.device]


def small_engine(**stages: dict[str, Any]) -> Engine:
    tiny: dict[str, dict[str, Any]] = {
        "camera": {"height": 12, "width": 12},
        "render": {"n_samples_per_ray": 24},
        "engine": {"device": "cpu"},
    }
    for stage, settings in stages.items():
        tiny[stage] = {**tiny.get(stage, {}), **settings}
    config = dataclasses.replace(toyworld_config(), prompt="a red mushroom")
    return Engine(config_from_dict(tiny, config), pipeline=cpu_pipeline())


@functools.cache
def cpu_pipeline() -> Pipeline:
    return load_pipeline(toyworld_config().model, "cpu")


def parameters(engine: Engine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.optimizer.parameters()])


def test_a_benchmark_can_ask_for_a_time_step() -> None:
    engine = small_engine()
    early, late = engine.step(t=980, delta=0), engine.step(t=250, delta=0)
    assert (early.t, late.t) == (980, 250) and early.n_unet_calls > late.n_unet_calls
    assert engine.step().t < 980


def test_steps_that_are_not_finite_change_nothing_and_end_the_run() -> None:
    engine = small_engine()
    engine.run(until=2)
    before = parameters(engine)
    views = engine.prompts.views.clone()
    engine.prompts.views.fill_(float("nan"))
    bad = engine.step()
    assert bad.skipped and bad.bad_steps == engine.bad_steps == 1
    assert torch.equal(parameters(engine), before) and engine.optimizer.n_steps == 2
    engine.prompts.views.copy_(views)
    assert not engine.step().skipped and engine.bad_steps == 0
    after = parameters(engine)
    engine.prompts.views.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"in {MAX_BAD_STEPS} steps in a row"):
        engine.run()
    assert torch.equal(parameters(engine), after)
    assert engine.global_step == 4 + MAX_BAD_STEPS
    assert sum(row["skipped"] for row in engine.history) == 1 + MAX_BAD_STEPS


def test_rays_that_are_not_shifted_draw_nothing() -> None:
    engine = small_engine(render={"randomized": False})
    engine.step()
    assert not engine.buffers.jitter.any()
    shifted = small_engine()
    shifted.step()
    assert shifted.buffers.jitter.any()


def test_a_gpus_noise_cannot_go_on_elsewhere() -> None:
    engine = small_engine()
    state = engine.state_tensors()
    state["engine.noise"] = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(SDIFastError, match="its noise was drawn on a GPU"):
        engine.load_state_tensors(state)


def test_graphs_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(SDIFastError, match=r"^engine.graphs: true needs the fused renderer"):
        small_engine(engine={"graphs": True, "device": "cpu"})


@pytest.mark.gpu
@pytest.mark.slow
def test_a_run_on_a_gpu_can_be_looked_at() -> None:
    """Steps through the fused renderer, then what an export asks for."""
    config = dataclasses.replace(toyworld_config(), prompt="a red mushroom")
    engine = Engine(config)
    assert engine.device.type == "cuda"
    engine.run(until=3)
    assert engine.bad_steps == 0 and all(row["n_samples"] > 0 for row in engine.history)
    output = engine.render(orbit_cameras(config.camera, 2, height=16, width=16))
    assert output.comp_rgb.is_cuda and output.opacity.max() > 0.5
    assert engine.density(torch.zeros(1, 3)).item() > 1.0
