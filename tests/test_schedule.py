"""Noise levels, grids, paths and annealing against methods.md A, C1, C5 and its tables."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import relative_error

from sdi_fast.config import GuidanceConfig
from sdi_fast.diffusion.invert import n_unet_calls
from sdi_fast.diffusion.schedule import (
    DDIMSchedule,
    annealed_timestep,
    delta_from_uniform,
    draw_delta,
)
from sdi_fast.types import SDIFastError

SD21_BASE = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
# methods.md A, as printed there
ALPHAS = {
    0: 0.99915, 1: 0.99830, 100: 0.8942, 250: 0.6738, 400: 0.4245, 500: 0.2763, 600: 0.1608,
    700: 0.0825, 800: 0.0369, 900: 0.01415, 980: 0.00584, 999: 0.00466,
}  # fmt: skip
SIGMAS = {250: 0.696, 500: 1.618, 980: 13.04}
# methods.md C, Cost: highest t, lowest t, inversion calls, all calls, steps of 10000
COSTS = [
    (980, 902, 11, 12, 1069),
    (901, 802, 10, 11, 1370),
    (801, 702, 9, 10, 1370),
    (701, 602, 8, 9, 1370),
    (601, 502, 7, 8, 1369),
    (501, 402, 6, 7, 1370),
    (401, 302, 5, 6, 1370),
    (301, 250, 4, 5, 712),
]


@pytest.fixture(scope="module")
def schedule() -> DDIMSchedule:
    return DDIMSchedule.from_config(SD21_BASE)


def half_a_digit(printed: float) -> float:
    """Half a unit of the last printed digit: all that the table says."""
    digits = len(str(printed).split(".")[1])
    return 0.5001 * 10.0**-digits


@pytest.mark.parametrize("t", ALPHAS)
def test_alphas_are_those_of_the_table(schedule, t):
    assert float(schedule.alpha(torch.tensor(t))) == pytest.approx(
        ALPHAS[t], abs=half_a_digit(ALPHAS[t])
    )


@pytest.mark.parametrize("t", SIGMAS)
def test_sigmas_are_those_of_the_table(schedule, t):
    assert float(schedule.sigma(torch.tensor(t))) == pytest.approx(
        SIGMAS[t], abs=half_a_digit(SIGMAS[t])
    )


def test_clean_end_follows_the_config(schedule):
    t = torch.tensor([-99, -1, 0, 5])
    alphas = schedule.alpha(t)
    assert alphas.dtype == torch.float32
    assert alphas[0] == alphas[1] == alphas[2] == schedule.alphas_cumprod[0]
    assert alphas[3] == schedule.alphas_cumprod[5]
    to_one = DDIMSchedule.from_config({**SD21_BASE, "set_alpha_to_one": True})
    assert to_one.alpha(t).tolist()[:2] == [1.0, 1.0]
    assert to_one.alpha(t)[2] == schedule.alphas_cumprod[0]


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_beta_schedules_are_diffusers_own(beta_schedule):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule=beta_schedule, num_train_timesteps=400)
    ours = DDIMSchedule.from_config(dict(theirs.config))
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.n_train_steps == 400
    assert ours.alpha(torch.tensor(-1)) == theirs.final_alpha_cumprod


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_conversions_agree_with_diffusers_and_invert_each_other(prediction_type):
    from diffusers import DDIMScheduler

    config = {**SD21_BASE, "prediction_type": prediction_type}
    schedule = DDIMSchedule.from_config(config)
    theirs = DDIMScheduler.from_config(config)
    theirs.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 4, 4, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([3, 980, 500, 999])
    x0, eps = schedule.split(x, output, t)
    for b, level in enumerate(t):
        step = theirs.step(output[b], int(level), x[b], eta=0.0)
        # alpha is f32 in both, so that the f64 arithmetic agrees nearly to its own precision
        assert relative_error(x0[b], step.pred_original_sample) < 1e-6
    assert relative_error(schedule.output_from_eps(x, eps, t), output) < 1e-12
    assert relative_error(schedule.add_noise(x0, eps, t), x) < 1e-6  # a + (1 - a) is f32's 1
    assert relative_error(schedule.x0_from_eps(x, eps, t), x0) < 1e-6
    assert relative_error(schedule.eps_from_x0(x, x0, t), eps) < 1e-6


def test_step_variance_is_diffusers_variance(schedule):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler.from_config(SD21_BASE)
    steps = [(-99, 1), (1, 101), (601, 615), (901, 999)]
    t, t_next = torch.tensor(steps).T
    expected = torch.stack([theirs._get_variance(b, a) for a, b in steps])
    torch.testing.assert_close(schedule.step_variance(t, t_next), expected)


def test_grid_is_that_of_diffusers_inverse_scheduler(schedule):
    from diffusers import DDIMInverseScheduler

    for spacing in ("leading", "trailing"):
        config = {**SD21_BASE, "timestep_spacing": spacing}
        theirs = DDIMInverseScheduler.from_config(config)
        for n in (3, 5, 10, 20, 30):
            theirs.set_timesteps(n)
            assert DDIMSchedule.from_config(config).grid(n) == theirs.timesteps.tolist()


@pytest.mark.parametrize("row", COSTS, ids=lambda row: f"t={row[0]}..{row[1]}")
def test_number_of_unet_calls_is_that_of_the_cost_table(schedule, row):
    high, low, inversion, total, _ = row
    for t in range(low, high + 1):
        assert n_unet_calls(schedule, t, GuidanceConfig(inversion_n_steps=10)) == total
        assert len(schedule.inversion_path(t, 0, 10)) - 1 == inversion


def test_annealing_spends_the_steps_that_the_cost_table_says(schedule):
    config = GuidanceConfig()
    visited = [int(annealed_timestep(step, 10_000, config)) for step in range(10_000)]
    assert visited[0] == 980
    assert visited[-1] == 250
    assert sorted(visited, reverse=True) == visited
    counts = Counter(n_unet_calls(schedule, t, config) for t in visited)
    assert counts == {total: steps for _, _, _, total, steps in COSTS}
    mean = sum(calls * steps for calls, steps in counts.items()) / 10_000
    assert mean == pytest.approx(8.625, abs=0.0005)


def test_annealing_stays_at_its_end_and_below_the_last_step():
    config = GuidanceConfig(t_range=(0.2, 1.0))
    assert annealed_timestep(0, 100, config, batch_size=3).tolist() == [999] * 3
    assert annealed_timestep(100, 100, config).tolist() == [200]
    assert annealed_timestep(500, 100, config).tolist() == [200]  # methods.md G12
    assert annealed_timestep(0, 100, config, n_train_steps=500).tolist() == [499]


def test_random_time_steps_are_uniform_over_both_ends():
    config = GuidanceConfig(t_range=(0.25, 0.254), t_anneal=False)
    generator = torch.Generator().manual_seed(0)
    drawn = annealed_timestep(7, 10, config, batch_size=5000, generator=generator)
    assert drawn.device.type == "cpu"
    counts = torch.bincount(drawn - 250)
    assert len(counts) == 5
    # 1000 expected in each; 6 standard deviations of a binomial are 170
    assert (counts - 1000).abs().max() < 170
    again = annealed_timestep(
        7, 10, config, batch_size=5000, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(drawn, again)


def test_bad_ranges_and_a_missing_generator_are_refused():
    with pytest.raises(SDIFastError, match=r"t_range: expected 0 <= low <= high <= 1"):
        annealed_timestep(0, 10, GuidanceConfig(t_range=(0.9, 0.2)))
    with pytest.raises(SDIFastError, match=r"t_range"):
        annealed_timestep(0, 10, GuidanceConfig(t_range=(0.2, 1.2)))
    with pytest.raises(SDIFastError, match="generator: expected"):
        annealed_timestep(0, 10, GuidanceConfig(t_anneal=False))


@pytest.mark.parametrize("variant", ["threestudio", "paper"])
@pytest.mark.parametrize("t", [-5, 0, 1, 1000])
def test_a_time_step_without_a_path_is_refused(schedule, t, variant):
    with pytest.raises(SDIFastError, match=rf"t: expected a time step from 2 to 999.*got {t}"):
        schedule.inversion_path(t, 0, 10, variant)


def test_a_trailing_grid_that_starts_late_names_its_first_step():
    schedule = DDIMSchedule.from_config({**SD21_BASE, "timestep_spacing": "trailing"})
    assert schedule.inversion_path(150, 5, 10) == (-1, 99, 155)
    with pytest.raises(SDIFastError, match="t: expected more than 99"):
        schedule.inversion_path(60, 0, 10)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_bad_numbers_of_steps_are_refused(schedule, n):
    with pytest.raises(SDIFastError, match=rf"inversion_n_steps: expected 1 to 1000, got {n}"):
        schedule.grid(n)


@pytest.mark.parametrize("n", [1, 3, 5, 10, 30])
def test_threestudio_paths_rise_to_the_level(schedule, n):
    for t in (2, 250, 615, 999):
        for delta in (0, 17, 500):
            path = schedule.inversion_path(t, delta, n)
            assert path[-1] == min(t + delta, 999)
            assert path[0] == 1 - 1000 // n
            assert all(a < b for a, b in zip(path, path[1:], strict=False))
            assert list(path[1:-1]) == [
                k * (1000 // n) + 1 for k in range(n) if k * (1000 // n) + 1 < t
            ]


def test_paper_paths_have_ten_t_equal_steps(schedule):
    for t, steps in [(2, 1), (99, 1), (250, 2), (615, 6), (980, 9), (999, 9)]:
        path = schedule.inversion_path(t, 20, 10, "paper")
        assert len(path) - 1 == steps  # methods.md G5: int(10 t), at least one
        assert path[0] == 0
        assert path[-1] == min(t + 20, 999)
        strides = [b - a for a, b in zip(path, path[1:], strict=False)]
        assert max(strides) - min(strides) <= 1


@pytest.mark.parametrize("n", [1, 2, 4, 9, 1000])
def test_even_paths_are_equal_steps_and_fewer_at_a_small_t(schedule, n):
    counts = []
    for t in (2, 3, 250, 333, 334, 615, 667, 980, 999):
        for delta in (0, 17, 500):
            path = schedule.even_path(t, delta, n)
            assert path[0] == 1 and path[-1] == min(t + delta, 999)
            strides = [b - a for a, b in zip(path, path[1:], strict=False)]
            assert max(strides) - min(strides) <= 1 and min(strides) >= 1
            assert len(strides) <= n
        counts.append(len(strides))
    assert sorted(counts) == counts and counts[0] == 1
    if n == 4:
        assert counts == [1, 2, 2, 2, 3, 3, 4, 4, 4]
    for t, delta, name in ((1, 0, "t"), (1000, 0, "t"), (500, -1, "delta")):
        with pytest.raises(SDIFastError, match=f"^{name}: expected"):
            schedule.even_path(t, delta, n)


def test_delta_covers_its_range_and_no_more():
    uniform = torch.tensor([0.0, 0.37, 0.5, 0.999999], dtype=torch.float64)
    assert delta_from_uniform(uniform, 10).tolist() == [0, 37, 50, 99]
    assert delta_from_uniform(uniform, 5).tolist() == [0, 74, 100, 199]
    # methods.md G2: tau in U(0, 1/30)
    assert delta_from_uniform(uniform, 10, variant="paper").tolist() == [0, 12, 16, 33]
    drawn = draw_delta(4000, torch.Generator().manual_seed(0), GuidanceConfig())
    assert (int(drawn.min()), int(drawn.max())) == (0, 99)
    assert abs(float(drawn.double().mean()) - 49.5) < 6 * 28.9 / 4000**0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type: expected one of epsilon, v_prediction"),
        ({"prediction_type": "flow"}, "got 'flow'"),
        ({"timestep_spacing": "linspace"}, "timestep_spacing: expected one of leading, trailing"),
        ({"beta_schedule": "sigmoid"}, "expected a config that DDIM can read"),
    ],
)
def test_unknown_schedules_are_refused(change, message):
    with pytest.raises(SDIFastError, match=message):
        DDIMSchedule.from_config({**SD21_BASE, **change})
