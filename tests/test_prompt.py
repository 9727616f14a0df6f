"""Prompts, views and Perp-Neg interpolation against methods.md C4."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tiny_sd import CONTEXT_LENGTH, WIDTH, make_tiny_sd
from torch import Tensor

from sdi_fast.config_io import check_prompt
from sdi_fast.constants import (
    MAX_PROMPT_CHARS,
    PERP_NEG_BACK_FRONT,
    PERP_NEG_FRONT_SIDE,
    PERP_NEG_SIDE_BACK,
    VIEW_NAMES,
)
from sdi_fast.diffusion.pipeline import load_text_model, quiet_libraries
from sdi_fast.diffusion.prompt import (
    PromptEmbeddings,
    TextEncoder,
    shifted_decay,
    view_index,
)
from sdi_fast.types import SDIFastError

# angles on both sides of every threshold, and beyond a full turn
ANGLES = [(az, el) for az in range(-360, 361, 15) for el in (-10.0, 30.0, 59.9, 60.0, 60.1, 90.0)]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> TextEncoder:
    from transformers import CLIPTokenizer

    folder = make_tiny_sd(tmp_path_factory.mktemp("tiny"))
    with quiet_libraries():
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        return TextEncoder(load_text_model(folder), tokenizer)


@pytest.fixture
def prompts() -> PromptEmbeddings:
    values = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    return PromptEmbeddings(values[:4], values[4])


def expected_perp_neg(prompts: PromptEmbeddings, azimuth: float, elevation: float):
    """methods.md C4 for one view, in plain Python: [4, T, D] embeddings and two weights."""
    view = dict(zip(VIEW_NAMES, prompts.views.double(), strict=True))
    uncond = prompts.uncond.double()
    if elevation > 60:
        return torch.stack([view["overhead"], uncond, uncond, uncond]), (0.0, 0.0)
    az = abs((azimuth + 180) % 360 - 180)

    def f(a: float, b: float, c: float, r: float) -> float:
        return a * math.exp(-b * r) + c

    if az < 90:
        r = 1 - az / 90
        positive = r * view["front"] + (1 - r) * view["side"]
        negatives = [view["front"], view["side"]]
        weights = (-f(4, 0.5, -2.426, r), -f(4, 0.5, -2.426, 1 - r))
    else:
        r = 2 - az / 90
        positive = r * view["side"] + (1 - r) * view["back"]
        negatives = [view["side"], view["front"]]
        weights = (-f(1, 0.5, -0.606, r), -f(1, 0.5, 0.967, r))
    return torch.stack([positive, uncond, *negatives]), weights


@pytest.mark.parametrize(
    ("coefficients", "at_zero", "at_one"),
    [
        (PERP_NEG_FRONT_SIDE, 1.574, 0.0),
        (PERP_NEG_SIDE_BACK, 0.394, 0.0),
        (PERP_NEG_BACK_FRONT, 1.967, 1.574),
    ],
)
def test_decay_has_the_values_of_methods_c4(coefficients, at_zero, at_one):
    values = shifted_decay(coefficients, torch.tensor([0.0, 1.0], dtype=torch.float64))
    # three printed digits
    assert values.tolist() == pytest.approx([at_zero, at_one], abs=0.0006)


def test_discrete_views_follow_the_thresholds():
    cases = {
        (0, 0): "front", (44.9, 0): "front", (-44.9, 0): "front", (45, 0): "side",
        (-45, 0): "side", (90, 0): "side", (135, 0): "side", (135.1, 0): "back",
        (-135.1, 0): "back", (180, 0): "back", (-180, 0): "back", (360, 0): "front",
        (540, 0): "back", (0, 60): "front", (0, 60.1): "overhead", (170, 80): "overhead",
    }  # fmt: skip
    azimuth = torch.tensor([az for az, _ in cases])
    elevation = torch.tensor([float(el) for _, el in cases])
    chosen = [VIEW_NAMES[i] for i in view_index(azimuth.float(), elevation)]
    assert chosen == list(cases.values())


def test_discrete_condition_looks_up_the_view_of_each_sample(prompts):
    azimuth, elevation = torch.tensor([180.0, 0.0, 90.0, 0.0]), torch.tensor([0.0, 0, 0, 70])
    condition = prompts.condition(azimuth, elevation, perp_neg=False)
    assert condition.neg_weights is None
    assert (condition.n_conditions, condition.batch_size) == (2, 4)
    for row, name in enumerate(("back", "front", "side", "overhead")):
        assert torch.equal(condition.embeddings[0, row], prompts.views[VIEW_NAMES.index(name)])
        assert torch.equal(condition.embeddings[1, row], prompts.uncond)


def test_perp_neg_agrees_with_the_formulas_at_every_angle_in_one_batch(prompts):
    azimuth = torch.tensor([float(az) for az, _ in ANGLES])
    elevation = torch.tensor([el for _, el in ANGLES])
    condition = prompts.condition(azimuth, elevation)
    assert condition.embeddings.shape == (4, len(ANGLES), 4, 6)
    for row, (az, el) in enumerate(ANGLES):
        embeddings, weights = expected_perp_neg(prompts, az, el)
        # f32 rounding of angles of a few hundred degrees and of one multiply-add
        assert condition.neg_weights[row].tolist() == pytest.approx(weights, abs=1e-5)
        torch.testing.assert_close(
            condition.embeddings[:, row].double(), embeddings, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("perp_neg", [True, False])
def test_a_batch_holds_what_each_sample_gets_alone(prompts, perp_neg):
    azimuth, elevation = torch.tensor([10.0, -130, 95, 0]), torch.tensor([0.0, 20, -5, 75])
    batch = prompts.condition(azimuth, elevation, perp_neg)
    for row in range(4):
        alone = prompts.condition(azimuth[row : row + 1], elevation[row : row + 1], perp_neg)
        picked = batch.select(torch.tensor([row]))
        assert torch.equal(picked.embeddings, alone.embeddings)
        if perp_neg:
            assert torch.equal(picked.neg_weights, alone.neg_weights)


def test_angles_of_unequal_shape_are_refused(prompts):
    with pytest.raises(SDIFastError, match=r"azimuth_deg, elevation_deg: expected two \[B\]"):
        prompts.condition(torch.zeros(2), torch.zeros(3))


def test_embeddings_are_those_of_transformers_for_the_suffixed_texts(text_encoder):
    prompts = PromptEmbeddings.encode(text_encoder, " a cat ", negative_prompt="dim")
    assert prompts.views.shape == (4, CONTEXT_LENGTH, WIDTH)
    assert prompts.views.dtype == torch.float32
    texts = ["a cat, side view", "a cat, front view", "a cat, back view", "a cat, overhead view"]
    for text, ours in [*zip(texts, prompts.views, strict=True), ("dim", prompts.uncond)]:
        ids = text_encoder.tokenizer(
            text, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True
        ).input_ids
        theirs = text_encoder.model(torch.tensor([ids])).last_hidden_state[0]
        # the same network in a batch of five or one
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_text_encoder_runs_once_a_run(text_encoder, monkeypatch):
    forwards = []
    original = text_encoder.model.forward

    def counted(*args: Tensor, **kwargs: Tensor):
        forwards.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(text_encoder.model, "forward", counted)
    prompts = text_encoder.encode("a cat")
    for azimuth in (-170.0, 0.0, 100.0):
        prompts.condition(torch.tensor([azimuth]), torch.tensor([10.0]))
        prompts.condition(torch.tensor([azimuth]), torch.tensor([10.0]), perp_neg=False)
    assert len(forwards) == 1


@pytest.mark.parametrize(
    "text",
    ["🍄🍄", "${oc.env:HOME}", "../../x", "{prompt}", "%s", "日本の城", "lib:cow"],
)
def test_hostile_text_is_only_text(text_encoder, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are longer than 24 byte tokens
        prompts = text_encoder.encode(text)
    assert check_prompt(text) == text
    assert torch.isfinite(prompts.views).all()
    assert not torch.equal(prompts.views[0], text_encoder.encode("a cat").views[0])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: expected a description such as .*, got nothing"),
        (" \n\t", "prompt: expected a description"),
        (None, "prompt: expected text, got NoneType"),
        (7, "prompt: expected text, got int"),
        ("x" * 1_000_000, "prompt: expected at most 1000 characters, got 1000000"),
        ("a\ud800b", "prompt: expected valid Unicode text"),
        ("a\x00b", "prompt: expected valid Unicode text"),
    ],
    ids=["empty", "blank", "none", "int", "1 MB", "surrogate", "null"],
)
def test_bad_prompts_are_refused_in_one_line(text_encoder, prompt, message):
    with pytest.raises(SDIFastError, match=message) as caught:
        text_encoder.encode(prompt)
    assert "\n" not in str(caught.value)


def test_limits_of_the_prompt():
    assert len(check_prompt("x" * MAX_PROMPT_CHARS)) == MAX_PROMPT_CHARS
    assert check_prompt("", "negative_prompt", allow_empty=True) == ""
    with pytest.raises(SDIFastError, match="negative_prompt: expected at most"):
        check_prompt("x" * 1001, "negative_prompt", allow_empty=True)


def test_truncation_warns_once(tmp_path):
    from transformers import CLIPTokenizer

    folder = make_tiny_sd(tmp_path / "tiny")
    with quiet_libraries():
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder = TextEncoder(load_text_model(folder), tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.embed(["a cat"])  # fits: no warning
    with pytest.warns(UserWarning, match="text encoder reads the first 24") as caught:
        encoder.encode("a very long description of a cat")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode("a very long description of a dog")
