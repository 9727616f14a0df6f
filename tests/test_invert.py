"""DDIM inversion: round trips, batches, v-prediction, noise, and the paper's variant.

Arithmetic is f64 with a(t) in f32, so that errors are those of the method, not of rounding.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from analytic import (
    condition_numbers,
    gaussian_eps,
    model_of,
    sd_schedule,
    wavy_eps,
)
from conftest import relative_error
from torch import Tensor

from sdi_fast.config import GuidanceConfig
from sdi_fast.diffusion.invert import Inversion, ddim_invert, ddim_walk, plan_inversion
from sdi_fast.guidance import SDI
from sdi_fast.types import SDIFastError

SHAPE = (4, 6, 6)
CONFIG = GuidanceConfig()
PAPER = GuidanceConfig(variant="paper")
MIXED_T, MIXED_DELTA = [980, 250, 615, 301, 99], [37, 20, 0, 99, 3]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def plain_condition(batch: int):
    return condition_numbers([[0.5 + 0.1 * b for b in range(batch)], [0.0] * batch])


def perp_condition(batch: int):
    return condition_numbers(
        [[0.5 + 0.1 * b for b in range(batch)], [0.0] * batch, [0.9] * batch, [-0.7] * batch],
        [[-0.5 - 0.1 * b, -1.2] for b in range(batch)],
    )


def invert(model, z, condition, t, delta, config, **kwargs) -> Inversion:
    plan = plan_inversion(model.schedule, t, delta, config)
    return ddim_invert(model, z, condition, plan, config, **kwargs)


# ---- round trips ----------------------------------------------------------------------------


def test_a_constant_prediction_round_trips_exactly():
    model = model_of(lambda x, a, c: torch.full_like(x, 0.3))
    z, condition = normal(2, *SHAPE), plain_condition(2)
    path = [0, 100, 300, 700, 999]
    up = ddim_walk(model, z, condition, path, scale=7.5)
    down = ddim_walk(model, up, condition, path[::-1], scale=7.5)
    assert relative_error(up, z) > 0.5  # it did go somewhere
    assert relative_error(down, z) < 1e-6  # a + (1 - a) is 1 to f32's precision


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_round_trip_error_falls_with_the_number_of_steps(scale):
    """g_inv = g_fwd and eta = 0: DDIM is Euler's method, of first order in the step."""
    model = model_of(gaussian_eps)
    z = 0.3 * normal(2, *SHAPE) + 0.5
    condition = condition_numbers([[0.5, 0.5], [0.2, 0.2]])
    errors = []
    for n in (20, 40, 80, 160, 320):
        path = [round(k * 960 / n) for k in range(n + 1)]
        up = ddim_walk(model, z, condition, path, scale)
        errors.append(relative_error(ddim_walk(model, up, condition, path[::-1], scale), z))
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.6 < ratio < 2.2 for ratio in ratios), errors  # towards 2: halving halves it
    assert errors[-1] < 0.025, errors


def test_opposite_guidance_does_not_round_trip():
    """The control of the test above: (-7.5, 7.5), as SDI uses, is not an inverse."""
    model = model_of(gaussian_eps)
    z = 0.3 * normal(1, *SHAPE) + 0.5
    condition = condition_numbers([[0.5], [0.2]])
    path = [round(k * 960 / 160) for k in range(161)]
    up = ddim_walk(model, z, condition, path, -7.5)
    assert relative_error(ddim_walk(model, up, condition, path[::-1], 7.5), z) > 0.2


def test_inversion_finds_the_noise_of_a_gaussian():
    """For N(c, .3^2) data the probability flow is known: kappa is affine in z."""
    model = model_of(gaussian_eps)
    config = dataclasses.replace(
        CONFIG, inversion_eta=0.0, inversion_n_steps=250, inversion_guidance_scale=1.0,
        cfg_convention="paper",
    )  # fmt: skip
    z = 0.3 * normal(2, *SHAPE) + 0.5
    out = invert(model, z, condition_numbers([[0.5] * 2, [0.0] * 2]), [900] * 2, [0, 50], config)
    for b, level in enumerate((900, 950)):
        a0, a = (float(model.schedule.alphas_cumprod[i]) for i in (0, level))
        # the flow keeps (x - sqrt(a) c) / std(a); the start is taken at level a(0)
        spread, spread0 = ((v * 0.09 + 1 - v) ** 0.5 for v in (a, a0))
        x = a**0.5 * 0.5 + (z[b] - a0**0.5 * 0.5) * spread / spread0
        kappa = (x - a**0.5 * z[b]) / (1 - a) ** 0.5
        # Euler with 250 steps a run; the error at 125 steps is twice this
        assert relative_error(out.latents_inverted[b], x) < 0.03
        assert relative_error(out.kappa[b], kappa) < 0.03


# ---- batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["threestudio", "paper"])
@pytest.mark.parametrize("make_condition", [plain_condition, perp_condition])
def test_samples_of_different_t_and_delta_are_as_if_alone(variant, make_condition):
    config = dataclasses.replace(CONFIG, variant=variant)
    n = len(MIXED_T)
    z, condition = normal(n, *SHAPE), make_condition(n)
    model = model_of(wavy_eps)
    plan = plan_inversion(model.schedule, MIXED_T, MIXED_DELTA, config)
    noise = normal(1 if variant == "paper" else plan.n_steps, n, *SHAPE, seed=1)
    batch = ddim_invert(model, z, condition, plan, config, eta_noise=noise, with_trajectory=True)
    assert batch.n_unet_calls == len(model.denoiser.calls) == plan.n_steps
    assert len(batch.trajectory) == plan.n_steps
    assert torch.equal(batch.trajectory[-1], batch.latents_inverted)
    total_rows = sum(len(t) for _, t in model.denoiser.calls)
    assert total_rows == condition.n_conditions * sum(plan.lengths)  # no call for who arrived
    for b in range(n):
        rows = torch.tensor([b])
        own = plan_inversion(model.schedule, MIXED_T[b : b + 1], MIXED_DELTA[b : b + 1], config)
        alone = ddim_invert(
            model, z[rows], condition.select(rows), own, config,
            eta_noise=noise[: 1 if variant == "paper" else own.n_steps, rows],
        )  # fmt: skip
        assert int(alone.level[0]) == int(batch.level[b]) == min(MIXED_T[b] + MIXED_DELTA[b], 999)
        # elementwise f64 arithmetic, the sums of Perp-Neg within one sample
        torch.testing.assert_close(alone.latents_inverted[0], batch.latents_inverted[b])
        torch.testing.assert_close(alone.kappa[0], batch.kappa[b])


def test_the_unet_sees_the_cleaner_level_of_each_step():
    model = model_of(wavy_eps)
    config = dataclasses.replace(CONFIG, inversion_eta=0.0)
    invert(model, normal(2, *SHAPE), plain_condition(2), [250, 120], [20, 5], config)
    seen = [t.tolist() for _, t in model.denoiser.calls]
    assert seen == [[-99] * 4, [1] * 4, [101] * 4, [201] * 2]


# ---- v-prediction ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["threestudio", "paper"])
@pytest.mark.parametrize("make_condition", [plain_condition, perp_condition])
def test_a_v_model_of_an_eps_model_gives_the_same_target(variant, make_condition):
    config = dataclasses.replace(CONFIG, variant=variant)
    outputs = []
    for prediction_type in ("epsilon", "v_prediction"):
        model = model_of(wavy_eps, prediction_type)
        t = torch.tensor([700, 350])
        outputs.append(
            SDI(model, config).target(
                normal(2, *SHAPE),
                make_condition(2),
                t,
                torch.Generator().manual_seed(3),
            )
        )
    eps, v = outputs
    # a + (1 - a) is 1 to f32's precision in the conversions; 8 UNet calls amplify that
    for name in ("target", "kappa", "latents_inverted", "noise_pred"):
        assert relative_error(getattr(v, name), getattr(eps, name)) < 1e-4, name
    assert relative_error(eps.target, normal(2, *SHAPE)) > 0.1  # there is something to compare


# ---- noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "std"), [(250, 0.113), (600, 0.242), (980, 0.295)])
def test_entropy_noise_has_the_size_that_methods_g3_says(t, std):
    """Zero data and a UNet that predicts no noise: what is left is the propagated noise."""
    model = model_of(lambda x, a, c: torch.zeros_like(x))
    z = torch.zeros(4, 4, 64, 64, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    out = invert(model, z, plain_condition(4), [t] * 4, [0] * 4, CONFIG, generator=generator)
    # half a printed digit is 0.4 % of the smallest, five standard deviations of 65536 numbers 1.4 %
    assert float(out.latents_inverted.std()) == pytest.approx(std, rel=0.018)


def test_noise_comes_from_the_generator_alone():
    model, z, condition = model_of(wavy_eps), normal(2, *SHAPE), plain_condition(2)

    def go(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)  # the global generator must not matter
        generator = torch.Generator().manual_seed(seed)
        out = invert(model, z, condition, [500, 400], [0, 0], CONFIG, generator=generator)
        return out.latents_inverted

    assert torch.equal(go(0), go(0))
    assert not torch.equal(go(0), go(1))


def test_no_eta_needs_no_noise_and_eta_does():
    model, z, condition = model_of(wavy_eps), normal(1, *SHAPE), plain_condition(1)
    still = dataclasses.replace(CONFIG, inversion_eta=0.0)
    a = invert(model, z, condition, [500], [3], still)
    b = invert(model, z, condition, [500], [3], still, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a.latents_inverted, b.latents_inverted)
    with pytest.raises(SDIFastError, match="generator: expected a torch.Generator"):
        invert(model, z, condition, [500], [3], CONFIG)
    with pytest.raises(SDIFastError, match=r"eta_noise: expected shape \(6, 1, 4, 6, 6\)"):
        invert(model, z, condition, [500], [3], CONFIG, eta_noise=normal(3, 1, *SHAPE))


def test_kappa_takes_z_to_the_inverted_latents():
    model, z = model_of(wavy_eps), normal(2, *SHAPE)
    out = invert(
        model, z, plain_condition(2), [500, 300], [3, 60], CONFIG,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    rebuilt = model.schedule.add_noise(z, out.kappa, out.level)
    assert relative_error(rebuilt, out.latents_inverted) < 1e-12


# ---- the paper's variant --------------------------------------------------------------------


def test_paper_rebuilds_x_at_level_t_from_kappa():
    model, z = model_of(wavy_eps), normal(2, *SHAPE)
    t = torch.tensor([700, 350])
    output = SDI(model, PAPER).target(
        z, plain_condition(2), t, None, delta=torch.tensor([20, 33]),
        eta_noise=normal(1, 2, *SHAPE, seed=5),
    )  # fmt: skip
    x, seen = model.denoiser.calls[-1]
    a = model.schedule.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    expected = a.sqrt() * z + (1 - a).sqrt() * output.kappa
    assert seen.tolist() == [700, 350, 700, 350]
    torch.testing.assert_close(x[:2], expected, rtol=1e-6, atol=1e-6)
    # z - target = s(t) (e - kappa) when levels match (methods.md C8)
    sigma = ((1 - a) / a).sqrt()
    residual = sigma * (output.noise_pred - output.kappa)
    assert relative_error(z - output.target, residual) < 1e-6
    assert output.n_unet_calls == len(model.denoiser.calls) == 7 + 1  # int(10 t) and the target


def test_threestudio_feeds_the_inverted_latents_themselves_labelled_t():
    model, z = model_of(wavy_eps), normal(1, *SHAPE)
    output = SDI(model, CONFIG).target(
        z, plain_condition(1), torch.tensor([350]), torch.Generator().manual_seed(0),
        delta=torch.tensor([80]),
    )  # fmt: skip
    x, seen = model.denoiser.calls[-1]
    assert seen.tolist() == [350, 350]
    assert torch.equal(x[:1], output.latents_inverted)
    a = float(model.schedule.alphas_cumprod[350])
    expected = (x[:1] - (1 - a) ** 0.5 * output.noise_pred) / a**0.5
    assert relative_error(output.target, expected) < 1e-6


def test_paper_puts_the_noise_on_kappa_once():
    model, z, condition = model_of(wavy_eps), normal(2, *SHAPE), plain_condition(2)
    still = dataclasses.replace(PAPER, inversion_eta=0.0)
    noise = normal(1, 2, *SHAPE, seed=9)
    quiet = invert(model, z, condition, [800, 300], [10, 0], still)
    noisy = invert(model, z, condition, [800, 300], [10, 0], PAPER, eta_noise=noise)
    assert torch.equal(quiet.latents_inverted, noisy.latents_inverted)  # x itself has none
    a = model.schedule.alphas_cumprod[torch.tensor([810, 300])].double().view(-1, 1, 1, 1)
    expected = quiet.kappa + 0.3 * (1 - a).sqrt() * noise[0]
    assert relative_error(noisy.kappa, expected) < 1e-6


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["threestudio", "paper"])
@pytest.mark.parametrize("t", [1, 0, -3, 1000])
def test_a_time_step_without_a_path_is_refused(variant, t):
    model = model_of(wavy_eps)
    config = dataclasses.replace(CONFIG, variant=variant)
    with pytest.raises(SDIFastError, match=r"t: expected a time step from 2 to 999") as caught:
        SDI(model, config).target(
            normal(2, *SHAPE),
            plain_condition(2),
            torch.tensor([500, t]),
            torch.Generator().manual_seed(0),
        )
    assert "\n" not in str(caught.value)
    assert not model.denoiser.calls


def test_unequal_numbers_of_t_and_delta_are_refused():
    with pytest.raises(SDIFastError, match="t, delta: expected one of each a sample"):
        plan_inversion(sd_schedule(), [500, 400], [1], CONFIG)
    with pytest.raises(SDIFastError, match="delta: expected at least 0, got -1"):
        plan_inversion(sd_schedule(), [500], [-1], CONFIG)
