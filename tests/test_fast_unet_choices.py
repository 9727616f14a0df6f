"""The fast UNet's choices among kernels: measured, stored, recalled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor
from unets import inputs, randomise, sd21_topology

from sdi_fast.diffusion.denoiser import Denoiser
from sdi_fast.diffusion.fast_unet import CapturedUNet, FastUNet, FastUNetOptions
from sdi_fast.diffusion.fast_unet.choices import KERNELS, Choices, load_stored, store


def test_choices_keep_the_first_where_nothing_is_measured() -> None:
    choices = Choices()
    one, two = torch.tensor(1), torch.tensor(2)
    candidates = {"one": lambda: one, "two": lambda: two}
    assert choices.pick("key", candidates) is one
    choices.table["key"] = "two"
    assert choices.pick("key", candidates) is two


def test_choices_take_the_fastest_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        """Each candidate's result is its time; nothing takes 1."""

        def __init__(self, device: torch.device) -> None: ...

        def measure(self, function: Any, warm: Any) -> float:
            result = function()
            return 1.0 if result is None else 1.0 + float(result)

    def broken() -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr("sdi_fast.diffusion.fast_unet.choices.Timer", Clock)
    choices = Choices()
    candidates = {"slow": lambda: torch.tensor(3.0), "fast": lambda: torch.tensor(2.0)}
    choices.start(torch.device("cpu"))
    every = {"broken": broken, **candidates}
    assert choices.pick("key", every, compiled=("broken", "slow")) == 2.0
    choices.stop()
    assert choices.pick("key", candidates) == 2.0, "what was measured is kept"
    summary = choices.summary()["key"]
    assert summary["chosen"] == "fast" and summary["us"] == {"slow": 3.0, "fast": 2.0}
    assert "no kernel" in summary["failed"]["broken"]
    choices.start(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="no candidate"):
        choices.pick("other", {"broken": broken, "too": broken})


def test_nothing_is_measured_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    choices = Choices()
    choices.start(torch.device("cuda"))
    assert choices.timer is None
    assert (
        choices.pick("key", {"one": lambda: torch.tensor(1), "two": lambda: torch.tensor(2)}) == 1
    )
    assert not choices.times_us


def test_stored_choices_need_no_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sdi_fast.diffusion.fast_unet.choices.STORED", tmp_path / "stored")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda")
    assert load_stored(device) == {} == load_stored(torch.device("cpu"))
    choices = Choices()
    for key, name in (("a", "one"), ("b", "gone"), ("c", "broken")):
        choices.table[key], choices.times_us[key] = name, {name: 1.0}
    choices.table["not measured"] = "one"
    path = store(choices, device)
    assert path.name == "nvidia-h200.json"
    assert load_stored(device) == {"a": "one", "b": "gone", "c": "broken"}

    def broken() -> Tensor:
        raise RuntimeError("no kernel")

    candidates = {"two": lambda: torch.tensor(2), "one": lambda: torch.tensor(1), "broken": broken}
    recalled = Choices(load_stored(device))
    assert recalled.pick("a", candidates) == 1
    assert recalled.pick("b", candidates) == 2, "no such candidate any more: the first"
    assert recalled.pick("c", candidates) == 2 and "no kernel" in recalled.failures["c"]["broken"]
    for bad in ("{", "[]", path.read_text().replace(f'"kernels": {KERNELS}', '"kernels": 0')):
        path.write_text(bad)
        assert load_stored(device) == {}, "of older kernels, or not a file of ours"


@pytest.mark.gpu
def test_measured_choices_agree_and_are_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At small widths, which few tiles fit."""
    monkeypatch.setattr("sdi_fast.diffusion.fast_unet.choices.STORED", tmp_path)
    widths = dict(block_out_channels=(64, 64, 128, 128), attention_head_dim=[1, 1, 2, 2])
    unet = randomise(sd21_topology(**widths)).cuda().eval().requires_grad_(False)
    x, t, context = (v.cuda() for v in inputs(unet, 2, 1))
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = Denoiser(unet).predict(x, t, context)
    half = copy.deepcopy(unet).half()
    theirs = relative_error(Denoiser(half).predict(x, t, context), exact)
    options = FastUNetOptions(conv="measured", geglu="measured", upsample="measured")
    fast = FastUNet(half, options)
    captured = CapturedUNet(fast, 2, (16, 16), fast.prepare(context))
    assert relative_error(captured(x, t), exact) <= 2.0 * theirs
    assert {str(k).split("'")[1] for k in fast.choices.times_us} >= {"conv", "geglu", "upsample"}
    store(fast.choices, fast.device)
    again = FastUNet(half, options)
    again.warm_up(x, t, again.prepare(context))
    assert again.choices.table == fast.choices.table and not again.choices.times_us
