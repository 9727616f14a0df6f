"""The VAE's latents, its gradient in f32 and f16, and its images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from tiny_sd import IMAGE_SIZE, SAMPLE_SIZE, make_tiny_sd
from torch import Tensor

from sdi_fast.config import ModelConfig
from sdi_fast.diffusion.encoder import LatentEncoder
from sdi_fast.diffusion.pipeline import Pipeline, load_pipeline
from sdi_fast.diffusion.schedule import draw_normal
from sdi_fast.types import SDIFastError


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Pipeline:
    return load_pipeline(ModelConfig(id=str(tiny)))


def images_of(batch: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [IMAGE_SIZE, 24])
@pytest.mark.parametrize("sample", [True, False])
def test_encoder_and_its_gradient_are_diffusers_own(pipeline, size, sample):
    vae = pipeline.encoder.vae
    images = images_of(2, size)
    cotangent = torch.randn(
        2, 4, SAMPLE_SIZE, SAMPLE_SIZE, generator=torch.Generator().manual_seed(1)
    )

    ours = images.clone().requires_grad_()
    latents = pipeline.encoder.encode(ours, torch.Generator().manual_seed(7), sample)
    latents.backward(cotangent)

    theirs = images.clone().requires_grad_()
    resized = F.interpolate(theirs, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    posterior = vae.encode(resized * 2 - 1).latent_dist
    expected = posterior.mode()
    if sample:
        noise = draw_normal(posterior.mean.shape, torch.Generator().manual_seed(7), images)
        expected = posterior.mean + posterior.std * noise
    expected = expected * vae.config.scaling_factor
    expected.backward(cotangent)
    # the same operations in another order
    assert relative_error(latents, expected) < 1e-6
    assert relative_error(ours.grad, theirs.grad) < 1e-5
    assert ours.grad.norm() > 0
    assert all(p.grad is None for p in vae.parameters())


def test_encoding_is_fixed_by_its_generator(pipeline):
    images = images_of(1, IMAGE_SIZE)
    torch.manual_seed(0)
    a = pipeline.encoder.encode(images, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    b = pipeline.encoder.encode(images, torch.Generator().manual_seed(0))
    c = pipeline.encoder.encode(images, torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_shift_factor_is_honoured_both_ways(pipeline):
    vae = pipeline.encoder.vae
    shifted = LatentEncoder(vae, IMAGE_SIZE)
    shifted.shift_factor, shifted.scaling_factor = 0.25, 2.0
    images = images_of(1, IMAGE_SIZE)
    plain = pipeline.encoder.encode(images, sample=False) / vae.config.scaling_factor
    latents = shifted.encode(images, sample=False)
    torch.testing.assert_close(latents, (plain - 0.25) * 2.0)
    expected = (vae.decode(plain).sample * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shifted.decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_f16_gradients_do_not_underflow(tmp_path):
    """methods.md G11. The yardstick is plain f16 with a cotangent of a good size."""
    folder = make_tiny_sd(tmp_path / "sd", dtype=torch.float16)
    full = load_pipeline(ModelConfig(id=str(folder))).encoder
    half = load_pipeline(ModelConfig(id=str(folder), dtype="float16")).encoder
    images = images_of(2, IMAGE_SIZE)
    cotangent = torch.randn(
        2, 4, SAMPLE_SIZE, SAMPLE_SIZE, generator=torch.Generator().manual_seed(1)
    )

    def gradient(encoder: LatentEncoder, scale: float) -> Tensor:
        x = images.clone().requires_grad_()
        encoder.encode(x, sample=False).backward(cotangent * scale)
        return x.grad / scale

    x = images.clone().requires_grad_()
    mean = half.vae.encode((2 * x - 1).half()).latent_dist.mean.float() * half.scaling_factor
    mean.backward(cotangent)
    exact = gradient(full, 1.0)
    plain_error = relative_error(x.grad, exact)
    for scale in (1.0, 6e-5, 1e-9):
        error = relative_error(gradient(half, scale), exact)
        assert error < 2 * plain_error, (scale, error, plain_error)
    tiny_x = images.clone().requires_grad_()
    mean = half.vae.encode((2 * tiny_x - 1).half()).latent_dist.mean.float()
    mean.backward(cotangent * 1e-9)
    assert tiny_x.grad.abs().max() == 0  # without the scaling nothing is left


def test_a_gradient_that_is_not_finite_stays_visible(tmp_path):
    folder = make_tiny_sd(tmp_path / "sd", dtype=torch.float16)
    half = load_pipeline(ModelConfig(id=str(folder), dtype="float16")).encoder
    for value, finite in ((0.0, True), (float("nan"), False), (float("inf"), False)):
        x = images_of(1, IMAGE_SIZE).requires_grad_()
        latents = half.encode(x, sample=False)
        latents.backward(torch.full_like(latents, value))
        assert bool(torch.isfinite(x.grad).all()) is finite


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": torch.zeros(3, 8, 8), "sample": False}, r"images: expected \[B, 3, H, W\]"),
        ({"images": torch.zeros(1, 4, 8, 8), "sample": False}, r"got \(1, 4, 8, 8\)"),
        ({"images": torch.zeros(1, 3, 8, 8)}, "generator: expected a torch.Generator"),
    ],
)
def test_bad_images_are_refused(pipeline, kwargs, message):
    with pytest.raises(SDIFastError, match=message):
        pipeline.encoder.encode(**kwargs)
