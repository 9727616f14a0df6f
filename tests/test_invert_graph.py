"""SDI's target from fixed buffers against the same by ddim_invert; graphs on a GPU.

f64 on the CPU, so that only the noise stream and the order of sums differ.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from analytic import condition_numbers, model_of, sd_schedule, wavy_eps
from conftest import relative_error
from torch import Tensor

from sdi_fast.config import GuidanceConfig
from sdi_fast.diffusion.invert import n_unet_calls
from sdi_fast.diffusion.invert_graph import InversionGraphs
from sdi_fast.diffusion.prompt import Condition
from sdi_fast.diffusion.schedule import DDIMSchedule
from sdi_fast.diffusion.shortcuts import ConditionedUNet
from sdi_fast.guidance import SDI, GuidanceOutput
from sdi_fast.reference.philox import philox_normal
from sdi_fast.types import SDIFastError

SHAPE = (4, 6, 6)
CONFIG = GuidanceConfig()
PAPER = GuidanceConfig(variant="paper")
T, DELTA = [980, 250, 615, 301, 99], [37, 20, 0, 99, 3]
NAMES = ("target", "kappa", "latents_inverted", "noise_pred")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def condition_of(batch: int, perp_neg: bool, shift: float = 0.0) -> Condition:
    rows = [[0.5 + 0.1 * b + shift for b in range(batch)], [0.0] * batch]
    if not perp_neg:
        return condition_numbers(rows)
    weights = [[-0.5 - 0.1 * b, -1.2] for b in range(batch)]
    return condition_numbers([*rows, [0.9] * batch, [-0.7] * batch], weights)


def both(config, t, delta, condition, prediction_type="epsilon") -> tuple[GuidanceOutput, ...]:
    model = model_of(wavy_eps, prediction_type)
    n = len(t)
    n_noise = 1
    if config.variant == "threestudio":
        n_noise = max(n_unet_calls(model.schedule, i, config) for i in t) - 1
    noise = normal(n_noise, n, *SHAPE, seed=1)
    return tuple(
        SDI(model, config, static=static).target(
            normal(n, *SHAPE), condition, torch.tensor(t), None,
            delta=torch.tensor(delta), eta_noise=noise,
        )
        for static in (False, True)
    )  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["threestudio", "paper"])
@pytest.mark.parametrize("perp_neg", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_samples_of_different_t_and_delta_agree_with_the_eager_code(
    config, perp_neg, prediction_type
):
    eager, static = both(config, T, DELTA, condition_of(len(T), perp_neg), prediction_type)
    for name in NAMES:
        # V is computed in f32 there and in f64 here
        assert relative_error(getattr(static, name), getattr(eager, name)) < 1e-6, name
    assert static.n_unet_calls == eager.n_unet_calls
    assert static.target.dtype == torch.float64


def graphs_of(config=CONFIG, batch=2, **kwargs) -> InversionGraphs:
    model = model_of(wavy_eps)
    return InversionGraphs(
        model, config, normal(batch, *SHAPE), condition_of(batch, True), **kwargs
    )


@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["threestudio", "paper"])
def test_noise_of_the_stream_is_that_of_the_twin(config):
    z, condition, t, delta = normal(2, *SHAPE), condition_of(2, True), [500, 300], [7, 30]
    graphs = graphs_of(config, seed=11)
    graphs.rng_state = torch.tensor([11, 5])
    drawn = graphs.target(z, condition, t, delta)
    n = 1 if config.variant == "paper" else drawn.n_unet_calls - 1
    assert graphs.rng_state.tolist() == [11, 5 + n]
    noise = torch.stack(
        [philox_normal(torch.tensor([11, 5]), d, 2, z[0].numel()).view(z.shape) for d in range(n)]
    )
    given = graphs_of(config).target(z, condition, t, delta, eta_noise=noise.double())
    for name in NAMES:
        assert relative_error(getattr(drawn, name), getattr(given, name)) < 1e-6, name


def test_a_run_goes_on_from_its_rng_state():
    z, condition = normal(2, *SHAPE), condition_of(2, True)
    one, other = graphs_of(seed=3), graphs_of(seed=4)
    first = one.target(z, condition, [500, 300], [7, 30])
    kept = one.rng_state
    second = one.target(z, condition, [500, 300], [7, 30])
    assert not torch.equal(first.target, second.target)
    other.rng_state = kept
    assert torch.equal(other.target(z, condition, [500, 300], [7, 30]).target, second.target)
    assert one.check() < 1e-12
    assert torch.equal(one.rng_state, other.rng_state)  # check() leaves the stream


def test_the_guidance_is_fixed_by_its_generator():
    z, condition, t = normal(2, *SHAPE), condition_of(2, True), torch.tensor([500, 300])

    def go(sdi: SDI, seed: int) -> Tensor:
        return sdi.target(z, condition, t, torch.Generator().manual_seed(seed)).target

    sdi, again = (SDI(model_of(wavy_eps), CONFIG, static=True) for _ in range(2))
    a, b = go(sdi, 0), go(sdi, 1)
    assert not torch.equal(a, b)
    assert torch.equal(go(again, 1), b) and torch.equal(go(again, 0), a)
    with pytest.raises(SDIFastError, match="generator: expected a torch.Generator"):
        sdi.target(z, condition, t, None, delta=torch.tensor([1, 2]))


def test_no_eta_draws_nothing():
    graphs = graphs_of(dataclasses.replace(CONFIG, inversion_eta=0.0), seed=9)
    z, condition = normal(2, *SHAPE), condition_of(2, True)
    a = graphs.target(z, condition, [500, 300], [7, 30])
    assert graphs.rng_state.tolist() == [9, 0]
    assert torch.equal(a.target, graphs.target(z, condition, [500, 300], [7, 30]).target)


def test_results_are_not_overwritten_and_inputs_are_data():
    graphs = graphs_of(dataclasses.replace(CONFIG, inversion_eta=0.0))
    first = graphs.target(normal(2, *SHAPE), condition_of(2, True), [500, 300], [7, 30])
    kept = first.target.clone()
    other = graphs.target(normal(2, *SHAPE), condition_of(2, True, 0.4), [500, 300], [7, 30])
    assert torch.equal(first.target, kept)
    fresh = SDI(model_of(wavy_eps), graphs.config).target(
        normal(2, *SHAPE), condition_of(2, True, 0.4), torch.tensor([500, 300]), None,
        delta=torch.tensor([7, 30]),
    )  # fmt: skip
    assert relative_error(other.target, fresh.target) < 1e-10
    assert relative_error(other.target, kept) > 1e-3


class PreparedDenoiser:
    """The fast denoiser's protocol around a plain one."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.n_prepared = 0

    def prepare(self, context: Tensor) -> dict[str, Tensor]:
        self.n_prepared += 1
        return {"context": context}

    def predict_prepared(self, x: Tensor, t: Tensor, cache: dict[str, Tensor]) -> Tensor:
        k = len(cache["context"]) // len(x)
        return self.inner.predict(x.repeat(k, 1, 1, 1), t.repeat(k), cache["context"])


def test_a_denoiser_that_prepares_its_text_is_asked_once():
    z, condition = normal(2, *SHAPE), condition_of(2, True)
    plain = model_of(wavy_eps)
    prepared = model_of(wavy_eps)
    prepared.denoiser = PreparedDenoiser(prepared.denoiser)
    assert ConditionedUNet(prepared.denoiser).prepares
    outputs = [
        InversionGraphs(model, CONFIG, z, condition).target(z, condition, [500, 300], [7, 30])
        for model in (plain, prepared)
    ]
    assert torch.equal(outputs[0].target, outputs[1].target)
    assert prepared.denoiser.n_prepared == 1


@pytest.mark.parametrize(
    ("z", "condition"),
    [
        (normal(3, *SHAPE), condition_of(3, True)),
        (normal(2, *SHAPE), condition_of(2, False)),
        (normal(2, *SHAPE, dtype=torch.float32), condition_of(2, True)),
    ],
)
def test_other_shapes_are_refused_here_and_served_by_the_guidance(z, condition):
    graphs = graphs_of()
    with pytest.raises(SDIFastError, match="latents, condition: expected the shapes"):
        graphs.target(z, condition, [500] * len(z), [0] * len(z))
    sdi = SDI(model_of(wavy_eps), CONFIG, static=True)
    for latents, text in ((normal(2, *SHAPE), condition_of(2, True)), (z, condition)):
        t = torch.full((len(latents),), 500)
        out = sdi.target(latents, text, t, torch.Generator().manual_seed(0))
        assert out.target.shape == latents.shape


def test_bad_noise_and_time_steps_are_named():
    z, condition = normal(2, *SHAPE), condition_of(2, True)
    with pytest.raises(SDIFastError, match=r"eta_noise: expected shape \(6, 2, 4, 6, 6\)"):
        graphs_of().target(z, condition, [500, 300], [7, 30], eta_noise=normal(3, 2, *SHAPE))
    with pytest.raises(SDIFastError, match="t: expected a time step from 2 to 999"):
        graphs_of().target(z, condition, [500, 1], [7, 30])
    with pytest.raises(SDIFastError, match="rng_state: expected"):
        graphs_of().rng_state = torch.zeros(2)


# ---- on a GPU -------------------------------------------------------------------------------


class SmallUNet:
    """Two convolutions that see x, t and the text, in f16."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first = (torch.randn(16, 4, 3, 3, generator=generator) / 6).cuda().half()
        self.second = (torch.randn(4, 16, 3, 3, generator=generator) / 12).cuda().half()

    def predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        h = torch.nn.functional.conv2d(x.half(), self.first, padding=1)
        h = h + context.mean((1, 2)).view(-1, 1, 1, 1).half() + (t.view(-1, 1, 1, 1) / 1000).half()
        return torch.nn.functional.conv2d(h.tanh(), self.second, padding=1).float()


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["threestudio", "paper"])
@pytest.mark.parametrize("perp_neg", [False, True])
def test_graphs_replay_what_the_eager_code_computes(config, perp_neg):
    schedule = DDIMSchedule(sd_schedule().alphas_cumprod.cuda())
    model = SimpleNamespace(schedule=schedule, denoiser=SmallUNet())

    def inputs(batch: int, shift: float) -> tuple[Tensor, Condition]:
        c = condition_of(batch, perp_neg, shift)
        weights = None if c.neg_weights is None else c.neg_weights.cuda().float()
        z = normal(batch, 4, 16, 16, seed=int(10 * shift), dtype=torch.float32)
        return z.cuda(), Condition(c.embeddings.cuda().float(), weights)

    z, condition = inputs(3, 0.0)
    graphs = InversionGraphs(model, config, z, condition, seed=7, max_graphs=2)
    eager = InversionGraphs(model, config, z, condition, seed=7, capture=False)
    for i, t in enumerate(([980, 250, 615], [301, 99, 120], [980, 401, 615], [600, 20, 30])):
        z, condition = inputs(3, 0.1 * i)
        delta = [3 * i, 50, 99]
        a, b = (g.target(z, condition, t, delta) for g in (graphs, eager))
        for name in NAMES:
            assert relative_error(getattr(a, name), getattr(b, name)) < 1e-5, (i, name)
        assert torch.equal(graphs.rng_state, eager.rng_state)
        assert graphs.check(1e-5) <= 1e-5
    assert graphs.n_graphs == 2
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        c = graphs.target(z, condition, t, delta)
    side.synchronize()
    assert relative_error(c.target, eager.target(z, condition, t, delta).target) < 1e-5
