"""What the engine decides about devices; whole runs are in test_cli_runs.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sdi_fast.engine
from sdi_fast.camera import orbit_cameras
from sdi_fast.config import EngineConfig, toyworld_config
from sdi_fast.engine import Engine, choose_backend
from sdi_fast.types import Camera

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("deterministic", "backend", "device", "expected"),
    [
        (False, "auto", CUDA, "auto"),
        (True, "auto", CPU, "auto"),  # the C++ ops repeat every bit
        (True, "auto", CUDA, "reference"),
        (True, "cuda", CUDA, "cuda"),  # asked for by name
        (False, "reference", CPU, "reference"),
    ],
)
def test_deterministic_runs_keep_away_from_atomics(
    deterministic: bool, backend: str, device: torch.device, expected: str
) -> None:
    config = EngineConfig(deterministic=deterministic, backend=backend)
    assert choose_backend(config, device) == expected


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
