"""Approximate inversions: which calls are cheaper, that the rest is exact, what is lost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from analytic import model_of, sd_schedule, wavy_eps
from conftest import relative_error
from test_fast_unet import SD21, TOLERANCE, UNETS, build, inputs, randomise, sd21_topology
from test_invert_graph import condition_of, normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdi_fast import cli
from sdi_fast.config import (
    SPEEDS,
    Config,
    GuidanceConfig,
    ModelConfig,
    Shortcuts,
    toyworld_config,
)
from sdi_fast.config_io import config_from_dict
from sdi_fast.diffusion.denoiser import Denoiser
from sdi_fast.diffusion.fast_unet import FastUNet, FastUNetOptions
from sdi_fast.diffusion.fast_unet.packing import pack
from sdi_fast.diffusion.fast_unet.work import call_flops
from sdi_fast.diffusion.guide import combine
from sdi_fast.diffusion.invert import n_unet_calls
from sdi_fast.diffusion.invert_graph import InversionGraphs
from sdi_fast.diffusion.pipeline import Pipeline, load_pipeline
from sdi_fast.diffusion.prompt import Condition
from sdi_fast.diffusion.schedule import DDIMSchedule
from sdi_fast.diffusion.shortcuts import SD21_COSTS, Call, plan_calls, target_work
from sdi_fast.guidance import SDI
from sdi_fast.placement import settle_guidance
from sdi_fast.toyworld.evaluate import held_out_cameras
from sdi_fast.toyworld.renderer import render_scene
from sdi_fast.toyworld.scenes import parse_caption
from sdi_fast.types import SDIFastError

SETTINGS = [Shortcuts(a, b, c) for a in (0, 1, 2, 3) for b in (0, 1, 2, 3) for c in (False, True)]
MERGED = Shortcuts(merge_negatives=True)


# ---- which calls ----------------------------------------------------------------------------


def shown(calls: tuple[Call, ...]) -> str:
    """F, f: full with 4, 2 conditions; S, s: shallow; M, m: with 3."""
    letters = {4: "SF", 3: "mM", 2: "sf"}
    return "".join(letters[c.n_conditions][c.full] for c in calls)


@pytest.mark.parametrize(
    ("shortcuts", "expected"),
    [
        (Shortcuts(), "FFFFFFFF"),
        (Shortcuts(1, 1), "FFFFFFFF"),
        (Shortcuts(2, 0), "FSFSFSFF"),
        (Shortcuts(3, 0), "FSSFSSFF"),
        (Shortcuts(0, 2), "FfFfFfFF"),
        (Shortcuts(0, 100), "FffffffF"),
        (Shortcuts(2, 2), "FsFsFsFF"),
        (Shortcuts(3, 3), "FssFssFF"),
        # step 4 needs the negatives' deep feature, which step 3 left out: it computes all anew
        (Shortcuts(3, 2), "FsSfFsSF"),
        (MERGED, "MMMMMMMM"),
        (Shortcuts(0, 100, True), "MffffffM"),
        (Shortcuts(3, 2, True), "MsmfMsmM"),
    ],
)
def test_which_calls_are_full(shortcuts: Shortcuts, expected: str) -> None:
    assert shown(plan_calls(7, 4, shortcuts)) == expected


@pytest.mark.parametrize("shortcuts", SETTINGS, ids=str)
def test_a_plan_begins_and_ends_in_full_and_knows_no_length(shortcuts: Shortcuts) -> None:
    longest = plan_calls(12, 4, shortcuts)
    for n in range(1, 12):
        calls = plan_calls(n, 4, shortcuts)
        k = 3 if shortcuts.merge_negatives else 4
        assert calls[:-1] == longest[:n] and calls[0] == calls[-1] == Call(True, k)
    assert all(call.n_conditions == 2 for call in plan_calls(9, 2, shortcuts)), "no negatives"


# ---- how much work --------------------------------------------------------------------------


def test_work_is_counted_in_full_calls() -> None:
    costs = {Call(True, 4): 10.0, Call(True, 3): 8.0, Call(True, 2): 6.0, Call(False, 4): 4.0}
    costs[Call(False, 2)] = 3.0
    assert target_work(plan_calls(7, 4, Shortcuts()), 4, costs) == 8.0
    assert target_work(plan_calls(7, 4, Shortcuts(3, 2)), 4, costs) == pytest.approx(
        (10 + 3 + 4 + 6 + 10 + 3 + 4 + 10) / 10
    )
    assert target_work(plan_calls(7, 2, Shortcuts(2, 0)), 2, costs) == pytest.approx(
        (4 * 6 + 3 * 3 + 6) / 6
    )
    assert target_work(plan_calls(3, 4, Shortcuts(0, 9, True)), 4, costs) == pytest.approx(
        (8 + 6 + 6 + 8) / 10
    )


def test_the_presets_do_what_the_config_says() -> None:
    schedule = model_of(wavy_eps).schedule

    def work(speed: Any, levels: Sequence[int]) -> list[float]:
        config = GuidanceConfig(speed=speed)
        n_calls = [n_unet_calls(schedule, t, config) for t in levels]
        return [target_work(plan_calls(n - 1, 4, config.shortcuts)) for n in n_calls]

    def rounded(speed: Any) -> list[float]:
        return [round(x, 1) for x in work(speed, (980, 615, 250))]

    assert rounded("exact") == [12, 9, 5]
    assert rounded("balanced") == [7.5, 5.3, 3.0]
    assert rounded("turbo") == [3.0, 2.5, 2.0]
    annealing = range(250, 981)
    means = [sum(work(s, annealing)) / len(annealing) for s in ("exact", "balanced", "turbo")]
    assert means == pytest.approx([8.63, 5.59, 2.68], abs=0.01)


def test_the_count_is_that_of_torch() -> None:
    unet = sd21_topology().eval()
    x, t, context = inputs(unet, 1, 1)
    # attention as matrix products: the counter does not know the CPU's own
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet(x, t, context)
    packed = pack(unet, upsample="nearest")
    aside = 2 * context[0].numel() * packed.text.shape[1]  # keys and values of the text
    time = [unet.time_embedding.linear_1, unet.time_embedding.linear_2]
    aside += sum(2 * layer.weight.numel() for layer in time)
    aside += 2 * 64 * packed.time_table.shape[1]  # each resnet's projection of the time
    expected = counter.get_total_flops() - aside
    assert call_flops(packed, (16, 16), 1, n_tokens=context.shape[1]) == expected


def test_the_costs_are_those_of_stable_diffusion() -> None:
    with torch.device("meta"):
        packed = pack(build(**SD21))
    full = call_flops(packed, (64, 64), 4)
    for call, cost in SD21_COSTS.items():
        flops = call_flops(packed, (64, 64), call.n_conditions, shallow=not call.full)
        assert flops / full == pytest.approx(cost, abs=5e-4), call


# ---- the UNet in two parts --------------------------------------------------------------------


@pytest.mark.parametrize("name", UNETS)
def test_the_parts_make_the_whole(name: str) -> None:
    unet = UNETS[name]().eval().requires_grad_(False)
    fast = FastUNet(unet)
    x, t, context = inputs(unet, 2, 4)
    cache = fast.prepare(context)
    expected = fast.predict_prepared(x, t, cache)
    whole, deep = fast.predict_deep(x, t, cache)
    kept = deep.clone()
    assert torch.equal(whole, expected)
    assert torch.equal(fast.predict_shallow(x, t, cache, deep), expected)
    assert torch.equal(deep, kept), "it may be used again"
    two = fast.predict_shallow(x, t, cache.first(4), deep[:4])
    assert relative_error(two, expected[:4]) < TOLERANCE
    near = x + 0.1 * torch.randn_like(x)
    exact = fast.predict_prepared(near, t, cache)
    reused = fast.predict_shallow(near, t, cache, deep)
    assert TOLERANCE < relative_error(reused, exact) < relative_error(expected, exact)
    with pytest.raises(SDIFastError, match="deep: expected 8 rows, got 4"):
        fast.predict_shallow(x, t, cache, deep[:4])


# ---- targets ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toyworld() -> Pipeline:
    return load_pipeline(ModelConfig(id="toyworld", denoiser="fast"))


def scene(pipeline: Pipeline, batch: int) -> tuple[Tensor, Condition]:
    """Latents of ground truth views, and their text."""
    cameras = held_out_cameras(height=64, width=64)
    images, _ = render_scene(parse_caption("a blue house"), cameras)
    z = pipeline.encoder.encode(images[:batch].permute(0, 3, 1, 2).float(), sample=False)
    prompts = pipeline.prompts.encode("a blue house")
    return z, prompts.condition(cameras.azimuth_deg[:batch], cameras.elevation_deg[:batch])


def config_of(shortcuts: Shortcuts, **changes: Any) -> GuidanceConfig:
    base = dataclasses.replace(toyworld_config().guidance, inversion_n_steps=10, **changes)
    return dataclasses.replace(base, static=True, **dataclasses.asdict(shortcuts))


def target_of(
    pipeline: Any, config: GuidanceConfig, z: Tensor, condition: Condition, t: list[int]
) -> Any:
    zero = torch.zeros(len(t), dtype=torch.long)
    noise = normal(11, *z.shape[1:], dtype=z.dtype)  # of each step, the same for all samples
    n = max(n_unet_calls(pipeline.schedule, i, config) for i in t) - 1
    noise = noise[:n, None].expand(n, *z.shape)
    return SDI(pipeline, config).target(
        z, condition, torch.tensor(t), None, delta=zero, eta_noise=noise
    )


# Allowed residual as a multiple of the exact inversion's: over the ten prompts of bench_speed.py
# none was above 1.1; the rest is room for another prompt.
FACTOR = 1.25


def test_what_is_lost_on_the_bundled_model(toyworld: Pipeline) -> None:
    t = [250, 615, 980]
    z, condition = scene(toyworld, 3)

    def residuals(shortcuts: Shortcuts) -> tuple[Any, Tensor]:
        out = target_of(toyworld, config_of(shortcuts, inversion_eta=0.0), z, condition, t)
        error = (out.noise_pred - out.kappa).square().mean((1, 2, 3))
        return out, toyworld.schedule.sigma(torch.tensor(t)) ** 2 * error

    exact, expected = residuals(Shortcuts())
    same, _ = residuals(Shortcuts(1, 1))
    assert torch.equal(same.target, exact.target)
    presets = [SPEEDS[name] for name in ("balanced", "turbo")]
    for shortcuts in (Shortcuts(2, 0), Shortcuts(0, 2), Shortcuts(3, 3), MERGED, *presets):
        out, residual = residuals(shortcuts)
        off = (out.target - exact.target).flatten(1).norm(dim=1)
        off = off / (exact.target - z).flatten(1).norm(dim=1)
        assert (off > 1e-3).all(), "nothing was left out"
        assert (residual < FACTOR * expected).all(), (shortcuts, residual / expected)


@pytest.mark.parametrize("shortcuts", [Shortcuts(2, 0), Shortcuts(3, 2), SPEEDS["turbo"]], ids=str)
def test_a_sample_does_not_depend_on_its_batch(toyworld: Pipeline, shortcuts: Shortcuts) -> None:
    """Those with fewer steps wait for the others, and end as if they were alone."""
    t = [250, 980, 401]
    z, condition = scene(toyworld, 3)
    config = config_of(shortcuts)
    together = target_of(toyworld, config, z, condition, t).target
    for i, t_i in enumerate(t):
        one = condition.select(torch.tensor([i]))
        alone = target_of(toyworld, config, z[i : i + 1], one, [t_i]).target
        assert relative_error(together[i : i + 1], alone) < 10 * TOLERANCE  # of up to 12 calls


def test_the_calls_are_those_planned(toyworld: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, seen = toyworld.denoiser, []

    def record(kind: str, name: str) -> None:
        original = getattr(denoiser, name)

        def wrapped(x: Tensor, t: Tensor, cache: Any, *rest: Any) -> Any:
            seen.append(kind if cache.n_rows == 4 else kind.lower())
            return original(x, t, cache, *rest)

        monkeypatch.setattr(denoiser, name, wrapped)

    record("F", "predict_deep")
    record("S", "predict_shallow")
    z, condition = scene(toyworld, 1)
    out = target_of(toyworld, config_of(Shortcuts(3, 2)), z, condition, [615])
    assert "".join(seen) == "FsSfFsSfF" and out.n_unet_calls == 9


def test_negatives_that_do_not_change_may_be_reused() -> None:
    """n_i - p constant in x and t: nothing is lost; in wavy_eps it changes. With any denoiser."""

    def shifted(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
        pattern = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x[0].shape)
        return 0.3 * torch.sin(x) + c * pattern + c * c

    z, condition, t = normal(2, 4, 6, 6), condition_of(2, True), [980, 250]
    for eps, same in ((shifted, True), (wavy_eps, False)):
        model = model_of(eps)
        results = [
            target_of(model, GuidanceConfig(static=True, reuse_negatives=n), z, condition, t).target
            for n in (0, 2)
        ]
        rows = [len(x) for x, _ in model.denoiser.calls[-12:]]
        assert rows == [8, 4] * 5 + [8, 8]
        assert (relative_error(*results) < 1e-12) is same


def test_negatives_whose_output_is_linear_in_the_text_may_be_merged() -> None:
    """c enters linearly: nothing is lost; in wavy_eps it does not. Also where none has a weight."""

    def linear(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
        pattern = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x[0].shape)
        return 0.3 * torch.sin(x) + c * pattern

    z, condition, t = normal(2, 4, 6, 6), condition_of(2, True), [980, 250]
    assert condition.neg_weights is not None
    overhead = torch.tensor([[0.0], [1.0]]).double()
    condition = Condition(condition.embeddings, overhead * condition.neg_weights)
    for eps, same in ((linear, True), (wavy_eps, False)):
        model = model_of(eps)
        results = [
            target_of(model, GuidanceConfig(static=True, merge_negatives=m), z, condition, t)
            for m in (False, True)
        ]
        assert [len(x) for x, _ in model.denoiser.calls[-12:]] == [6] * 12
        exact, merged = (out.target for out in results)
        assert torch.equal(merged[:1], exact[:1]) or relative_error(merged[:1], exact[:1]) < 1e-12
        assert (relative_error(merged, exact) < 1e-12) is same


def test_even_steps_are_extrapolated_to_the_grid() -> None:
    """As by hand: equal steps, the unconditional output carried to the mean of the grid's steps."""
    z, t = normal(1, 4, 6, 6), 615
    condition = condition_of(1, False)
    model = model_of(wavy_eps)
    config = GuidanceConfig(static=True, even_steps=4, inversion_eta=0.0)
    out = target_of(model, config, z, condition, [t])
    assert out.n_unet_calls == 4
    path, x, before = [1, 206, 410, 615], z, None
    rows = condition.embeddings.flatten(0, 1)
    for now, then in itertools.pairwise(path):
        level, after = torch.tensor([now]), torch.tensor([then])
        outputs = model.denoiser.predict(x.repeat(2, 1, 1, 1), level.repeat(2), rows)[:, None]
        eps = combine(outputs, None, config.inversion_guidance_scale, "threestudio")
        if before is not None:
            eps = eps + (0.5 - 50 / (then - now)) * (outputs[1] - before)
        before = outputs[1]
        x = model.schedule.ddim_step(x, eps, level, after)
    assert relative_error(out.latents_inverted, x) < 1e-6  # f32 levels


def test_even_steps_are_no_more_than_the_grid_has() -> None:
    z, condition = normal(2, 4, 6, 6), condition_of(2, True)
    for even, n_steps, n_calls in ((4, 10, 5), (100, 10, 11), (4, 3, 4)):
        config = GuidanceConfig(static=True, even_steps=even, inversion_n_steps=n_steps)
        out = target_of(model_of(wavy_eps), config, z, condition, [980, 250])
        assert out.n_unet_calls == n_calls


# ---- settings ---------------------------------------------------------------------------------


def test_what_is_set_beside_the_speed_wins() -> None:
    assert GuidanceConfig().shortcuts == Shortcuts() and GuidanceConfig().shortcuts.exact
    assert GuidanceConfig(speed="turbo").shortcuts == SPEEDS["turbo"]
    assert GuidanceConfig(speed="turbo", deep_cache=2).shortcuts == Shortcuts(2, 1000, True, 4)
    changed = GuidanceConfig(speed="turbo", merge_negatives=False, even_steps=0, reuse_negatives=0)
    assert changed.shortcuts == Shortcuts() and changed.shortcuts.exact
    assert not MERGED.exact and not Shortcuts(even_steps=1).exact and Shortcuts(1, 1).exact
    assert GuidanceConfig(deep_cache=2).shortcuts == Shortcuts(2, 0)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ({"speed": "warp"}, '^guidance.speed: expected "exact" or "balanced" or "turbo"'),
        (
            {"speed": "turbo", "static": False},
            "^guidance.speed: turbo needs guidance.static true, got false",
        ),
        ({"deep_cache": 2}, '^guidance.deep_cache: 2 needs model.denoiser "fast"'),
        (
            {"merge_negatives": True, "static": False},
            "^guidance.merge_negatives: true needs guidance.static true",
        ),
        ({"even_steps": 1001}, "^guidance.even_steps: expected 0 to 1000"),
        ({"deep_cache": 4}, "^guidance.deep_cache: expected 0 to 3, got 4"),
        ({"deep_cache": 2, "static": False}, "^guidance.deep_cache: 2 needs guidance.static true"),
        (
            {"speed": "balanced", "method": "sds"},
            '^guidance.speed: balanced needs guidance.method "sdi", got "sds"',
        ),
        ({"reuse_negatives": -1}, "^guidance.reuse_negatives: expected 0 to 1000"),
        (
            {"reuse_negatives": 2, "static": False},
            "^guidance.reuse_negatives: 2 needs guidance.static true",
        ),
        ({"reuse_negatives": 2.5}, "^guidance.reuse_negatives: expected an integer or null"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(guidance: dict[str, Any], message: str) -> None:
    with pytest.raises(SDIFastError, match=message) as caught:
        config_from_dict({"guidance": guidance, "model": {"denoiser": "diffusers"}})
    assert "\n" not in str(caught.value)


def test_the_eager_way_and_other_denoisers_refuse_them() -> None:
    model = model_of(wavy_eps)
    with pytest.raises(SDIFastError, match="expected static = True"):
        SDI(model, GuidanceConfig(reuse_negatives=2))
    unet = Denoiser(sd21_topology())
    plain = SimpleNamespace(schedule=model.schedule, denoiser=unet)
    with pytest.raises(SDIFastError, match=r'expected the denoiser "fast".* got .diffusers.'):
        SDI(plain, GuidanceConfig(static=True, deep_cache=2))


def test_a_speed_gets_the_fixed_buffers_that_it_needs() -> None:
    cpu = torch.device("cpu")

    def config(*options: str, **changes: Any) -> Config:
        command = cli.Generate(prompt="a mug", model="toyworld", set=options, **changes)
        return command.build_config()[0]

    for speed in ("balanced", "turbo"):
        found = config(speed=speed)
        assert found.guidance.shortcuts == SPEEDS[speed] and found.guidance.static is None
        assert settle_guidance(found.guidance, cpu).static
    plain = config()
    assert plain.guidance.static is None and plain.model == toyworld_config().model
    assert not settle_guidance(plain.guidance, cpu).static
    assert settle_guidance(plain.guidance, torch.device("cuda")).static
    assert not settle_guidance(config(method="sds").guidance, torch.device("cuda")).static
    own = config("guidance.deep_cache=3", speed="turbo", denoiser="auto")
    assert own.guidance.shortcuts.deep_cache == 3 and own.model.denoiser == "auto"
    with pytest.raises(SDIFastError, match="^guidance.deep_cache: 3 needs model.denoiser"):
        config("guidance.deep_cache=3", speed="turbo", denoiser="diffusers")


# ---- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shortcuts",
    [Shortcuts(2, 0), Shortcuts(0, 2), Shortcuts(3, 2), SPEEDS["balanced"], SPEEDS["turbo"]],
    ids=str,
)
def test_graphs_with_shortcuts_replay_what_the_eager_code_computes(shortcuts: Shortcuts) -> None:
    unet = randomise(sd21_topology()).eval().requires_grad_(False).cuda().half()
    schedule = DDIMSchedule(sd_schedule().alphas_cumprod.cuda())
    model = SimpleNamespace(schedule=schedule, denoiser=FastUNet(unet, FastUNetOptions()))
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(4, 2, 7, 24, generator=generator).cuda()
    condition = Condition(embeddings, torch.tensor([[-0.7, -1.6]]).repeat(2, 1).cuda())
    z = torch.randn(2, 4, 16, 16, generator=generator).cuda()
    config = GuidanceConfig(static=True, **dataclasses.asdict(shortcuts))
    graphs = InversionGraphs(model, config, z, condition, seed=3)
    for t in ([980, 250], [615, 401], [301, 120]):  # of as many lengths, with every setting
        out = graphs.target(z, condition, t, [3, 50])
        assert torch.isfinite(out.target).all()
        assert graphs.check() < 1e-3
    assert graphs.n_graphs == 3
