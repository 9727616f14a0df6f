"""The fast UNet's choices among kernels: measured, stored, recalled."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor
from unets import inputs, randomise, sd21_topology

from sdi_fast.diffusion.denoiser import Denoiser
from sdi_fast.diffusion.fast_unet import CapturedUNet, FastUNet, FastUNetOptions
from sdi_fast.diffusion.fast_unet.choices import KERNELS, STORED, Choices, load_stored, store
from sdi_fast.diffusion.fast_unet.layers import MEASURED_SDPA, MEASURED_SPLITS, Layers
from sdi_fast.diffusion.fast_unet.packing import Norm
from sdi_fast.ops import unet_ops


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
    stored = Choices({"key": "two"})
    stored.start(torch.device("cuda"))
    assert (
        stored.pick("key", {"one": lambda: torch.tensor(1), "two": lambda: torch.tensor(2)}) == 2
    ), "the same for all processes"


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


@pytest.mark.parametrize("path", sorted(STORED.glob("*.json")), ids=lambda path: path.stem)
def test_the_stored_files_name_what_there_is(path: Path) -> None:
    pytest.importorskip("triton")
    found = json.loads(path.read_text())
    assert found["kernels"] == KERNELS
    splits = {"default", *(f"{n} splits" for n in MEASURED_SPLITS)}
    for key, name in found["choices"].items():
        kind, shape, *_ = ast.literal_eval(key)
        if kind == "geglu":
            assert name in {"separate", *map(str, unet_ops.linear_geglu_tiles(*shape))}, key
        else:
            allowed = {
                "attention": set(MEASURED_SDPA),
                "group_norm": splits,
                "upsample": {"phase", "nearest"},
            }
            assert name in allowed[kind], key


class NoTimer:
    """Fails where anything is measured."""

    def __init__(self, device: torch.device) -> None: ...

    def measure(self, function: Any, warm: Any) -> float:
        raise AssertionError("measured")


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_auto_takes_what_is_stored_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, stored: bool, engine: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("sdi_fast.diffusion.fast_unet.choices.Timer", NoTimer)
    monkeypatch.setattr(unet_ops, "has_copy_engine", lambda: engine)
    seen: list[Any] = []
    fused, group_norm = unet_ops.linear_geglu, unet_ops.group_norm

    def watched_geglu(*args: Any, tile: Any, **options: Any) -> Tensor:
        seen.append(str(tile))
        return fused(*args, **options)

    def watched_norm(*args: Any, splits: int = 0, **options: Any) -> Tensor:
        seen.append(splits)
        return group_norm(*args, **options)

    monkeypatch.setattr(unet_ops, "linear_geglu", watched_geglu)
    monkeypatch.setattr(unet_ops, "group_norm", watched_norm)
    tile = str(unet_ops.linear_geglu_tiles(24, 16)[1])
    kept = {
        "('geglu', (24, 16), (16, 24), 'torch.float32')": tile,
        "('group_norm', (2, 4, 3, 16), 'torch.float32', True)": "16 splits",
    }
    choices = Choices(kept if stored else None)
    layers = Layers(FastUNetOptions(), choices)
    choices.start(torch.device("cpu"))
    x, weight = torch.randn(2, 4, 3, 16), torch.randn(24, 16).t()
    norm = Norm(torch.ones(16), torch.zeros(16), None, 1e-5, n_groups=4)
    for _ in range(2):
        seen.clear()
        gated = layers.feed_forward(x.view(24, 16), weight, torch.zeros(24))
        assert gated.shape == (24, 12) and layers.group_norm([x], norm).shape == x.shape
    assert seen == ([tile] if stored and engine else []) + [16 if stored else 0]
    assert not choices.times_us


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
    options = FastUNetOptions(geglu="measured", norms="measured", upsample="measured")
    fast = FastUNet(half, options)
    captured = CapturedUNet(fast, 2, (16, 16), fast.prepare(context))
    assert relative_error(captured(x, t), exact) <= 2.0 * theirs
    kinds = {"group_norm", "upsample"} | ({"geglu"} if unet_ops.has_copy_engine() else set())
    assert {str(k).split("'")[1] for k in fast.choices.times_us} >= kinds
    store(fast.choices, fast.device)
    again = FastUNet(half, options)
    again.warm_up(x, t, again.prepare(context))
    assert again.choices.table == fast.choices.table and not again.choices.times_us
