"""Guidance conventions, Perp-Neg, and the losses of SDI and SDS (methods.md B3, C3, C8, E)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from analytic import condition_numbers, model_of, wavy_eps
from conftest import relative_error
from torch import Tensor

from sdi_fast.config import GuidanceConfig
from sdi_fast.diffusion.guide import cfg_convention, combine, guided_output, perpendicular
from sdi_fast.guidance import SDI, SDS, make_guidance
from sdi_fast.types import SDIFastError

SHAPE = (4, 6, 6)


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


# ---- combination ----------------------------------------------------------------------------


def test_conventions_differ_by_one_in_the_scale():
    outputs = normal(2, 3, *SHAPE)
    for k in (-7.5, 0.0, 7.5, 100.0):
        ours = combine(outputs, None, k, "threestudio")
        assert relative_error(ours, combine(outputs, None, 1 + k, "paper")) < 1e-12  # g = 1 + k
    assert torch.equal(combine(outputs, None, 0.0, "paper"), outputs[1])
    assert relative_error(combine(outputs, None, 1.0, "paper"), outputs[0]) < 1e-12
    assert torch.equal(combine(outputs, None, 0.0, "threestudio"), outputs[0])


def test_perpendicular_is_orthogonal_sample_by_sample():
    x, y = normal(2, 3, *SHAPE)
    part = perpendicular(x, y)
    dots = (part * y).flatten(1).sum(1)
    assert dots.abs().max() < 1e-10
    for b in range(3):
        alone = perpendicular(x[b : b + 1], y[b : b + 1])
        torch.testing.assert_close(part[b : b + 1], alone)
    along = perpendicular(2.5 * y, y)
    assert along.abs().max() < 1e-12
    assert torch.equal(perpendicular(x, torch.zeros_like(y)), x)  # the floor of <y, y>


@pytest.mark.parametrize("convention", ["threestudio", "paper"])
def test_perp_neg_is_the_formula_of_c3_in_both_conventions(convention):
    outputs, weights = normal(4, 3, *SHAPE), normal(3, 2, seed=1)
    combined = combine(outputs, weights, 7.5, convention)
    for b in range(3):
        pos, uncond, *negatives = outputs[:, b]
        d = pos - uncond
        total = d.clone()
        for i, negative in enumerate(negatives):
            n = negative - uncond
            total += weights[b, i] * (n - d * (n * d).sum() / (d * d).sum())
        assert relative_error(combined[b], uncond + 7.5 * total) < 1e-12


def test_zero_negative_weights_are_plain_guidance_of_the_paper():
    outputs = normal(4, 2, *SHAPE)
    combined = combine(outputs, torch.zeros(2, 2), 7.5, "threestudio")
    assert relative_error(combined, combine(outputs[:2], None, 7.5, "paper")) < 1e-12


def test_rows_of_the_unet_batch_meet_their_own_condition():
    """methods.md G8: with B > 1 each sample must see its own four texts."""
    condition = condition_numbers(
        [[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [1000.0, 2000.0]], [[1.0, 0.0], [0.0, 1.0]]
    )
    model = model_of(lambda x, a, c: c * torch.ones_like(x) + x)
    x = normal(2, *SHAPE)
    guided_output(model.denoiser, x, torch.tensor([5, 700]), condition, 1.0, "paper")
    seen_x, seen_t = model.denoiser.calls[0]
    assert seen_t.tolist() == [5, 700] * 4
    assert torch.equal(seen_x, torch.cat([x] * 4))
    for b in range(2):
        alone = guided_output(
            model.denoiser, x[b : b + 1], torch.tensor([[5, 700][b]]),
            condition.select(torch.tensor([b])), 1.0, "paper",
        )  # fmt: skip
        both = guided_output(
            model.denoiser, x, torch.tensor([5, 700]), condition, 1.0, "paper"
        )  # fmt: skip
        torch.testing.assert_close(both[b : b + 1], alone)


def test_convention_follows_the_variant_unless_told():
    for variant in ("threestudio", "paper"):
        assert cfg_convention(GuidanceConfig(variant=variant)) == variant
        for asked in ("threestudio", "paper"):
            config = GuidanceConfig(variant=variant, cfg_convention=asked)
            assert cfg_convention(config) == asked


@pytest.mark.parametrize("make", [SDI, SDS])
def test_scale_convention_and_perp_neg_reach_both_methods(make):
    z, t = normal(2, *SHAPE), torch.tensor([600, 300])
    targets = {}
    for name, config, condition in [
        ("threestudio", GuidanceConfig(guidance_scale=4.0), plain_condition(2)),
        ("paper", GuidanceConfig(guidance_scale=5.0, cfg_convention="paper"), plain_condition(2)),
        ("wrong", GuidanceConfig(guidance_scale=4.0, cfg_convention="paper"), plain_condition(2)),
        ("perp_neg", GuidanceConfig(guidance_scale=4.0), perp_condition(2)),
    ]:
        # with g = 1 + k in both scales the two conventions are the same run
        shift = 1.0 if name in ("paper", "wrong") else 0.0
        config = dataclasses.replace(config, inversion_guidance_scale=-7.5 + shift)
        generator = torch.Generator().manual_seed(0)
        targets[name] = make(model_of(wavy_eps), config).target(z, condition, t, generator).target
    assert relative_error(targets["paper"], targets["threestudio"]) < 1e-9
    assert relative_error(targets["wrong"], targets["threestudio"]) > 1e-2
    assert relative_error(targets["perp_neg"], targets["wrong"]) > 1e-2


# ---- losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("make", "kwargs"), [(SDI, {}), (SDS, {"loss": "x0"})])
def test_x0_loss_pulls_each_latent_to_its_target(make, kwargs, batch):
    guidance = make(model_of(wavy_eps), GuidanceConfig(), **kwargs)
    z = normal(batch, *SHAPE).requires_grad_()
    output = guidance.target(
        z, plain_condition(batch), torch.full((batch,), 500), torch.Generator().manual_seed(0)
    )
    assert not output.target.requires_grad
    loss = guidance.loss(z, output)
    loss.backward()
    difference = (z - output.target).detach()
    numbers = difference.numel()
    assert loss.item() == pytest.approx(0.5 * float((difference**2).sum()) / numbers / batch)
    # methods.md C8: per element (z - target) / 16384 where B = 1 and C h w = 16384
    assert relative_error(z.grad, difference / numbers / batch) < 1e-12


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", ["threestudio", "paper"])
def test_latent_sds_has_the_gradient_of_its_formula(variant, batch):
    config = GuidanceConfig(variant=variant, guidance_scale=100.0)
    model = model_of(wavy_eps)
    guidance = SDS(model, config)
    z = normal(batch, *SHAPE).requires_grad_()
    t = torch.tensor([700, 300, 20])[:batch]
    noise = normal(batch, *SHAPE, seed=4)
    condition = plain_condition(batch)
    output = guidance.target(z, condition, t, None, noise=noise)
    loss = guidance.loss(z, output)
    loss.backward()

    a = model.schedule.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    x = a.sqrt() * z.detach() + (1 - a).sqrt() * noise
    eps = [wavy_eps(x, a, n[:, 0, 0].view(-1, 1, 1, 1)) for n in condition.embeddings]
    start = eps[0] if variant == "threestudio" else eps[1]
    guided = start + 100.0 * (eps[0] - eps[1])
    weight = 1 - a if variant == "threestudio" else ((1 - a) / a).sqrt()  # E; eq. 4
    gradient = weight * (guided - noise)
    assert relative_error(z.grad, gradient / batch) < 1e-6  # a(t) is f32
    assert loss.item() == pytest.approx(0.5 * float((gradient**2).sum()) / batch, rel=1e-5)
    assert output.n_unet_calls == len(model.denoiser.calls) == 1


def test_x0_sds_has_the_papers_weight():
    """z - x0hat = s(t) (e - eps), what makes it comparable with SDI (methods.md C8)."""
    model = model_of(wavy_eps)
    z, noise, t = normal(2, *SHAPE), normal(2, *SHAPE, seed=4), torch.tensor([700, 300])
    output = SDS(model, GuidanceConfig(), loss="x0").target(
        z, plain_condition(2), t, None, noise=noise
    )
    sigma = model.schedule.sigma(t).double().view(-1, 1, 1, 1)
    residual = sigma * (output.noise_pred - noise)
    assert relative_error(z - output.target, residual) < 1e-6
    rebuilt = model.schedule.add_noise(z, output.kappa, t)
    assert torch.equal(output.latents_inverted, rebuilt)


def test_sds_x0_is_sdi_with_drawn_noise_in_place_of_inverted():
    """Given SDI's own kappa, SDS's x0 loss and the paper's SDI are the same thing."""
    z, t, condition = normal(2, *SHAPE), torch.tensor([700, 300]), perp_condition(2)
    config = GuidanceConfig(variant="paper")
    generator = torch.Generator().manual_seed(2)
    sdi = SDI(model_of(wavy_eps), config).target(z, condition, t, generator)
    sds = SDS(model_of(wavy_eps), config, loss="x0").target(z, condition, t, None, noise=sdi.kappa)
    assert relative_error(sds.target, sdi.target) < 1e-12


def test_draws_come_from_the_generator_and_differ_by_sample():
    z, condition = torch.zeros(2, *SHAPE, dtype=torch.float64), plain_condition(2)
    for guidance in (
        SDI(model_of(wavy_eps), GuidanceConfig()),
        SDS(model_of(wavy_eps), GuidanceConfig()),
    ):
        t = torch.tensor([500, 500])
        first, again, other = (
            guidance.target(z, condition, t, torch.Generator().manual_seed(seed)).kappa
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first[0], first[1])


# ---- not finite, bad input ------------------------------------------------------------------


def broken_eps(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    out = wavy_eps(x, a, c)
    out[:, 0, 0, 0] = float("nan")
    return out


def test_sds_turns_nan_into_no_gradient():
    guidance = SDS(model_of(broken_eps), GuidanceConfig())
    z = normal(1, *SHAPE).requires_grad_()
    output = guidance.target(
        z, plain_condition(1), torch.tensor([500]), None, noise=normal(1, *SHAPE)
    )
    guidance.loss(z, output).backward()
    assert z.grad[0, 0, 0, 0] == 0
    assert torch.isfinite(z.grad).all()
    assert (z.grad[0, 1] != 0).all()
    assert bool(output.is_finite())


@pytest.mark.parametrize(("make", "kwargs"), [(SDI, {}), (SDS, {"loss": "x0"})])
def test_non_finite_targets_can_be_told(make, kwargs):
    for eps, finite in ((wavy_eps, True), (broken_eps, False)):
        output = make(model_of(eps), GuidanceConfig(), **kwargs).target(
            normal(1, *SHAPE),
            plain_condition(1),
            torch.tensor([500]),
            torch.Generator().manual_seed(0),
        )
        assert bool(output.is_finite()) is finite


def test_make_guidance_chooses_the_method():
    model = model_of(wavy_eps)
    assert isinstance(make_guidance(model, GuidanceConfig()), SDI)
    sds = make_guidance(model, GuidanceConfig(method="sds"))
    assert isinstance(sds, SDS)
    assert sds.loss_name == "x0"
    assert (
        make_guidance(model, GuidanceConfig(method="sds"), sds_loss="latent").loss_name == "latent"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "vsd"}, "method: expected 'sdi' or 'sds', got 'vsd'"),
        ({"variant": "other"}, "variant: expected one of threestudio, paper, got 'other'"),
        ({"cfg_convention": "x"}, "cfg_convention: expected one of"),
        ({"inversion_eta": -0.1}, "inversion_eta: expected at least 0, got -0.1"),
        ({"inversion_n_steps": 0}, "inversion_n_steps: expected at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(SDIFastError, match=message):
        make_guidance(model_of(wavy_eps), dataclasses.replace(GuidanceConfig(), **change))


@pytest.mark.parametrize("make", [SDI, SDS])
def test_inputs_that_do_not_fit_are_refused(make):
    guidance = make(model_of(wavy_eps), GuidanceConfig())
    z, condition, t = normal(2, *SHAPE), plain_condition(2), torch.tensor([500, 500])
    generator = torch.Generator().manual_seed(0)
    for args, message in [
        ((z[0], condition, t), r"latents: expected \[B, C, h, w\]"),
        ((z, condition, t[:1]), r"t: expected \[2\] integers"),
        ((z, condition, t.float()), r"t: expected \[2\] integers, got torch.float32"),
        ((z, plain_condition(3), t), "condition: expected 2 samples, got 3"),
    ]:
        with pytest.raises(SDIFastError, match=message):
            guidance.target(*args, generator)
    with pytest.raises(SDIFastError, match="generator: expected a torch.Generator"):
        guidance.target(z, condition, t, None)
    with pytest.raises(SDIFastError, match="loss: expected 'latent' or 'x0'"):
        SDS(model_of(wavy_eps), GuidanceConfig(), loss="image")
