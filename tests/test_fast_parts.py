"""The fast denoiser and encoder and the static target, as a config asks for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file
from small_runs import small_auto_config

from sdi_fast.api import generate
from sdi_fast.config import SPEEDS, Config, GuidanceConfig, ModelConfig, toyworld_config
from sdi_fast.config_io import config_from_dict
from sdi_fast.diffusion.denoiser import Denoiser, choose_denoiser
from sdi_fast.diffusion.fast_unet import FastUNet
from sdi_fast.diffusion.pipeline import load_pipeline
from sdi_fast.engine import Engine, StepMetrics
from sdi_fast.guidance import make_guidance
from sdi_fast.types import SDIFastError

FAST = {"model": {"denoiser": "fast", "encoder": "fast"}, "guidance": {"static": True}}
TOLERANCE = 1e-5  # f32, sums in another order; see test_fast_unet.py


def test_a_config_chooses_the_components(tiny: Path) -> None:
    plain, fast = (
        load_pipeline(ModelConfig(id=str(tiny), denoiser=kind, encoder=kind))
        for kind in ("diffusers", "fast")
    )
    assert plain.components == {"denoiser": "diffusers", "encoder": "diffusers"}
    assert fast.components == {"denoiser": "fast", "encoder": "fast"}
    assert isinstance(plain.denoiser, Denoiser) and isinstance(fast.denoiser, FastUNet)
    assert plain.notes == fast.notes == ()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 32)
    t = torch.tensor([-999, 500])  # as an inversion of one step asks for
    expected = plain.denoiser.predict(x, t, context)
    assert relative_error(fast.denoiser.predict(x, t, context), expected) < TOLERANCE
    images = torch.rand(1, 3, 16, 16)
    expected = plain.encoder.encode(images, sample=False)
    assert relative_error(fast.encoder.encode(images, sample=False), expected) < TOLERANCE


def test_auto_says_what_it_took_instead(tiny: Path) -> None:
    pipeline = load_pipeline(ModelConfig(id=str(tiny), denoiser="auto", encoder="auto"))
    if pipeline.device.type == "cpu":
        assert pipeline.components == {"denoiser": "diffusers", "encoder": "diffusers"}
        assert pipeline.notes == ()  # as everybody expects on a CPU

    class OnGPU:
        """A UNet of another class, which says that it is on a GPU."""

        def parameters(self) -> Any:
            return iter([SimpleNamespace(is_cuda=True)])

        def eval(self) -> OnGPU:
            return self

        def requires_grad_(self, _: bool) -> OnGPU:
            return self

    denoiser, why = choose_denoiser(OnGPU(), "auto")
    assert isinstance(denoiser, Denoiser)
    assert why.startswith("diffusers' UNet runs: unet: ") and "OnGPU" in why
    with pytest.raises(SDIFastError, match="OnGPU"):
        choose_denoiser(OnGPU(), "fast")


def test_the_guidance_follows_its_config(tiny: Path) -> None:
    pipeline = load_pipeline(ModelConfig(id=str(tiny)))
    assert make_guidance(pipeline, GuidanceConfig(static=True)).static is True
    assert make_guidance(pipeline, GuidanceConfig()).static is False
    with pytest.raises(SDIFastError, match=r'^static: expected false with method "sds"'):
        make_guidance(pipeline, GuidanceConfig(method="sds", static=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"denoiser": "quick"}}, '^model.denoiser: expected "diffusers" or "fast" or'),
        ({"model": {"encoder": True}}, '^model.encoder: expected "diffusers" or "fast" or "auto"'),
        ({"guidance": {"static": 1}}, "^guidance.static: expected true or false"),
        ({"guidance": {"static": True, "method": "sds"}}, "^guidance.static: expected false with"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SDIFastError, match=message) as caught:
        config_from_dict(settings)
    assert "\n" not in str(caught.value)


def stop_after(n: int) -> Any:
    def callback(engine: Engine, metrics: StepMetrics) -> None:
        if metrics.step + 1 == n:
            engine.request_stop()

    return callback


@pytest.mark.parametrize("speed", ["exact", "turbo"])
def test_a_static_run_resumed_equals_an_unbroken_one(
    speed: str, tiny: Path, tmp_path: Path
) -> None:
    config = config_from_dict(FAST, small_auto_config(tiny, "engine.deterministic=true"))
    config = config_from_dict({"guidance": {"speed": speed}}, config)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = generate(config, out=whole, steps=6)
    assert result.metrics["ran"] == {
        "denoiser": "fast", "encoder": "fast", "unet_linears": "exact", "renderer": "ops",
        "graphs": False, "static": True,
        **dataclasses.asdict(SPEEDS[speed]),
    }  # fmt: skip
    assert json.loads((whole / "metrics.json").read_text())["ran"]["denoiser"] == "fast"
    assert not generate(config, out=broken, steps=6, callbacks=[stop_after(3)]).completed
    again = generate(config, out=broken, steps=6, resume=True)
    assert [row["loss"] for row in again.metrics["history"]] == [
        row["loss"] for row in result.metrics["history"]
    ]
    ours, theirs = (load_file(p / "field.safetensors") for p in (broken, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses_of(config: Config, n: int) -> list[float]:
    engine = Engine(dataclasses.replace(config, prompt="a red mushroom"))
    engine.run(until=n)
    return [row["loss"] for row in engine.history]


@pytest.mark.slow
def test_the_bundled_model_runs_on_all_three(tmp_path: Path) -> None:
    """Without entropy noise neither way draws any, and so all draws are the same. Static targets
    draw theirs from a stream of their own, so with it the runs part."""
    config = toyworld_config().with_steps(8)
    quiet = config_from_dict({"guidance": {"inversion_eta": 0.0}}, config)
    expected = losses_of(quiet, 3)
    ours = losses_of(config_from_dict(FAST, quiet), 3)
    assert ours == pytest.approx(expected, rel=1e-4)  # f32, through three steps of Adam
    parts = {"model": FAST["model"]}
    noisy = losses_of(config, 3)
    assert losses_of(config_from_dict(parts, config), 3) == pytest.approx(noisy, rel=1e-4)
    assert noisy[0] != pytest.approx(expected[0], rel=1e-4), "the noise matters"
    small = {
        "camera": {"height": 32, "width": 32},
        "export": {"turntable_frames": 2, "turntable_size": 32, "mesh_resolution": 16,
                   "preview_views": 1, "preview_size": 32},
    }  # fmt: skip
    whole = dataclasses.replace(
        config_from_dict(FAST, config_from_dict(small, config)), prompt="a red mushroom"
    )
    result = generate(whole, out=tmp_path / "out")
    assert result.completed and result.metrics["skipped_steps"] == 0
    ran = result.metrics["ran"]
    assert (ran["denoiser"], ran["encoder"], ran["static"]) == ("fast", "fast", True)
