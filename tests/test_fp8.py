"""The UNet whose transformer blocks' linear layers are in e4m3, and the way to it from a config.

On the CPU it computes by the twins: rounded to e4m3 as on a GPU, multiplied in f32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from small_runs import small_auto_config
from test_fast_unet import UNETS, inputs, randomise, sd21_topology
from test_rows8 import needs_product

from sdi_fast import cli
from sdi_fast.config import SPEEDS, Config, ModelConfig, toyworld_config
from sdi_fast.config_io import config_from_dict
from sdi_fast.diffusion.denoiser import Denoiser, choose_denoiser
from sdi_fast.diffusion.fast_unet import FastUNet, FastUNetOptions
from sdi_fast.diffusion.fast_unet.fp8 import quantise_weight
from sdi_fast.diffusion.fast_unet.packing import Block, PackedUNet, Scales
from sdi_fast.diffusion.fast_unet.work import call_flops
from sdi_fast.diffusion.pipeline import load_pipeline
from sdi_fast.engine import Engine
from sdi_fast.ops import rows8
from sdi_fast.types import SDIFastError

FP8 = FastUNetOptions(linears="fp8")
# One product is off by 4% of its norm; here the residual stream and the convolutions carry most of
# the signal. Measured with these weights and inputs: 0.1% to 1.2%.
LARGEST_ERROR = 0.025


def blocks(packed: PackedUNet) -> list[Block]:
    levels = (*packed.down, packed.mid, *packed.up)
    return [block for level in levels for t in level.transformers for block in t.blocks]


@pytest.fixture(scope="module", params=UNETS)
def unet(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return UNETS[request.param]().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    return randomise(sd21_topology()).eval().requires_grad_(False)


def test_the_error_against_f32(unet: Any) -> None:
    x, t, context = inputs(unet, 3, 1)
    fast = FastUNet(unet, FP8)
    assert fast.linears == "fp8" and all(b.scales is not None for b in blocks(fast.packed))
    ours = fast.predict(x, t, context)
    error = relative_error(ours, Denoiser(unet).predict(x, t, context))
    assert 1e-4 < error < LARGEST_ERROR, "an approximation, and one that computes"
    assert torch.equal(ours, fast.predict(x, t, context)), "the same bits each time"


@pytest.mark.parametrize("n_conditions", [1, 2, 4])
def test_conditions_may_share_a_latent(unet: Any, n_conditions: int) -> None:
    """Rows have their own scales, so whatever else is in a batch changes nothing but sums' order,
    and with it a rounding to e4m3 now and then."""
    x, t, context = inputs(unet, 2, n_conditions)
    fast = FastUNet(unet, FP8)
    shared = fast.predict(x, t, context)
    alone = fast.predict(x.repeat(n_conditions, 1, 1, 1), t.repeat(n_conditions), context)
    exact = FastUNet(unet).predict(x, t, context)
    assert relative_error(shared, alone) < 0.5 * relative_error(alone, exact)


def test_inputs_and_the_text_cache_are_left_alone(small: Any) -> None:
    x, t, context = inputs(small, 2, 2)
    kept = [v.clone() for v in (x, t, context)]
    exact, fast = FastUNet(small), FastUNet(small, FP8)
    cache = fast.prepare(context)
    assert torch.equal(cache.projected, exact.prepare(context).projected), "exact as ever"
    projected = cache.projected.clone()
    first = fast.predict_prepared(x, t, cache)
    assert torch.equal(first, fast.predict(x, t, context))
    assert torch.equal(cache.projected, projected)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, t, context), strict=True))


def test_deep_and_shallow_calls(small: Any) -> None:
    x, t, context = inputs(small, 2, 2)
    fast = FastUNet(small, FP8)
    cache = fast.prepare(context)
    out, deep = fast.predict_deep(x, t, cache)
    kept = deep.clone()
    assert torch.equal(out, fast.predict_prepared(x, t, cache))
    shallow = fast.predict_shallow(x, t, cache, deep)
    assert torch.equal(deep, kept)
    assert relative_error(shallow, out) < LARGEST_ERROR, "the same time step: the same feature"


def test_what_is_in_e4m3(small: Any) -> None:
    exact, fast = FastUNet(small).packed, FastUNet(small, FP8).packed
    for ours, theirs in zip(blocks(fast), blocks(exact), strict=True):
        assert ours.scales is not None and theirs.scales is None
        for name in (field.name for field in dataclasses.fields(Scales)):
            weight, scale = getattr(ours, name), getattr(ours.scales, name)
            full = getattr(theirs, name)
            assert weight.dtype == rows8.E4M3 and weight.shape == full.shape
            assert weight.t().is_contiguous() and scale.is_contiguous()  # what torch asks for
            assert scale.shape == (1, full.shape[1])
            assert relative_error(weight.float() * scale, full) < 0.035
    assert torch.equal(fast.text, exact.text) and fast.conv_in.dtype == torch.float32
    assert call_flops(fast, (16, 16), 4) == call_flops(exact, (16, 16), 4)


def test_widths_that_torch_does_not_take_stay_exact() -> None:
    torch.manual_seed(0)
    odd = sd21_topology(block_out_channels=(24, 32, 48, 48), attention_head_dim=[1, 2, 3, 3])
    odd = randomise(odd).eval().requires_grad_(False)
    fast = FastUNet(odd, FP8)
    assert {b.out1.shape[0]: b.scales is None for b in blocks(fast.packed)} == {
        24: True, 32: False, 48: False,
    }  # fmt: skip
    x, t, context = inputs(odd, 2, 2)
    exact = FastUNet(odd).predict(x, t, context)
    assert 1e-4 < relative_error(fast.predict(x, t, context), exact) < LARGEST_ERROR


def test_a_weight_of_zeros_and_one_that_is_large() -> None:
    weight = torch.randn(32, 48).t()
    weight[:, 3] = 0.0
    weight[:, 4] *= 1e6
    values, scale = quantise_weight(weight)
    restored = values.float() * scale
    assert not restored[:, 3].any() and torch.isfinite(restored).all()
    errors = (restored - weight).norm(dim=0) / weight.norm(dim=0).clamp(min=1e-30)
    assert errors.max() < 0.04, "a column's error does not come of its neighbours"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for the CPU")
def test_triton_kernels_agree_with_the_twins_in_the_whole(small: Any) -> None:
    pytest.importorskip("triton")
    x, t, context = inputs(small, 1, 2, size=8)
    exact = FastUNet(small).predict(x, t, context)
    results = []
    for kernels in ("reference", "triton"):
        fast = FastUNet(small, dataclasses.replace(FP8, kernels=kernels))
        results.append(fast.predict(x, t, context))
    # sums in another order turn a rounding to e4m3 over now and then
    assert relative_error(results[1], results[0]) < 0.5 * relative_error(results[0], exact)


@needs_product
def test_torchs_own_product_in_the_whole(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch._scaled_mm in place of its twin."""
    x, t, context = inputs(small, 2, 2)
    fast = FastUNet(small, FP8)
    expected = fast.predict(x, t, context)
    calls: list[int] = []

    def product(
        a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor,
        *, dtype: torch.dtype, backend: str,
    ) -> torch.Tensor:  # fmt: skip
        calls.append(1)
        return rows8.scaled_mm(a, a_scale, b, b_scale, dtype)

    monkeypatch.setattr(rows8, "linear8", product)
    ours = fast.predict(x, t, context)
    assert len(calls) == 6 * len(blocks(fast.packed))
    exact = FastUNet(small).predict(x, t, context)
    assert relative_error(ours, expected) < 0.5 * relative_error(expected, exact)


# ---- from a config --------------------------------------------------------------------------


def test_nothing_asks_for_it_by_itself() -> None:
    assert FastUNetOptions().linears == "exact"
    assert Config().model.unet_linears == toyworld_config().model.unet_linears == "exact"
    assert "unet_linears" not in {f.name for s in SPEEDS.values() for f in dataclasses.fields(s)}


@pytest.mark.parametrize("denoiser", ["fast", "auto"])
def test_a_run_says_what_it_took(tiny: Path, denoiser: str) -> None:
    settings = (f"model.denoiser={denoiser}", "model.unet_linears=fp8")
    engine = Engine(small_auto_config(tiny, *settings))
    assert engine.ran["unet_linears"] == "fp8" and engine.ran["denoiser"] == "fast"
    engine.run(until=1)
    assert len(engine.history) == 1
    assert Engine(small_auto_config(tiny)).ran["unet_linears"] == "exact"


def test_it_is_set_by_set(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "a mug", "--model", "toyworld", "--set", "model.unet_linears=fp4"]
    assert cli.main(argv) != 0
    assert 'model.unet_linears: expected "exact" or "fp8"' in capsys.readouterr().err


def test_refusals_are_one_line(tiny: Path, small: Any) -> None:
    wrong = {"model": {"unet_linears": "fp8", "denoiser": "diffusers"}}
    for message, call in {
        '^model.unet_linears: fp8 needs model.denoiser "fast" or "auto", got "diffusers"$': (
            lambda: config_from_dict(wrong)
        ),
        '^linears: fp8 needs the "fast" denoiser, got "diffusers"$': (
            lambda: load_pipeline(
                ModelConfig(id=str(tiny), denoiser="diffusers", unet_linears="fp8")
            )
        ),
        "^linears: expected exact, fp8, got 'fp16'$": lambda: FastUNetOptions(linears="fp16"),
    }.items():
        with pytest.raises(SDIFastError, match=message):
            call()
    assert choose_denoiser(small, "auto", FP8)[0].linears == "fp8", "nothing else has it"


def test_a_device_that_lacks_it_is_never_fallen_back_from(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise SDIFastError("linears: fp8 needs another GPU")

    monkeypatch.setattr(rows8, "check_device", refuse)
    for kind in ("auto", "fast"):
        with pytest.raises(SDIFastError, match="another GPU"):
            choose_denoiser(small, kind, FP8)
