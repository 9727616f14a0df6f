"""The three trainings, each against a clock: autoencoder, denoiser with text encoder, scorer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import NO_VIEW, Dataset
from .models import SCHEDULER, ToyPipeline
from .optimise import Budget, MasterAdamW

KL_WEIGHT = 5e-4  # per latent element: keeps the latents smooth, costs little sharpness
EDGE_WEIGHT = 1.0
CAPTION_DROPOUT = 0.12
NO_SUFFIX = 0.15
LOW_T_SHARE, LOW_T = 0.25, 400  # inversion starts at low t: a quarter of the draws stay below
SNAPSHOT_S = 60.0
UNET_LR, VAE_LR, SCORER_LR = 6e-4, 1e-3, 1e-3
SCALE_IMAGES = 8192  # images that the latents' spread is measured on


@dataclass(frozen=True)
class Settings:
    """Sizes of a training run."""

    n_images: int = 130_000
    vae_batch: int = 128
    unet_batch: int = 512
    scorer_batch: int = 512
    n_holdout: int = 2048  # last images, never trained on
    max_steps: int = 0  # a phase; 0: only the clock
    compile: bool = False
    low_precision: bool = True  # bfloat16 compute
    unet_lr: float = UNET_LR  # peak


def _compiled(function: Any, settings: Settings) -> Any:
    """`function`, compiled if asked for; what cannot be compiled runs eagerly."""
    if not settings.compile:
        return function
    torch._dynamo.config.suppress_errors = True
    return torch.compile(function)


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `images` [B, 3, H, W], sigma in pixels."""
    offsets = torch.arange(-4, 5, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    images = F.conv2d(F.pad(images, (4, 4, 0, 0), mode="replicate"), kernel, groups=3)
    kernel = kernel.transpose(2, 3)
    return F.conv2d(F.pad(images, (0, 0, 4, 4), mode="replicate"), kernel, groups=3)


def _roughen(images: Tensor) -> Tensor:
    """Some images blurred, some mixed with another: what a half-trained NeRF looks like."""
    b = images.shape[0]
    n = b // 6
    if n == 0:
        return images
    sigma = 0.4 + 2.0 * float(torch.rand(()))
    weight = torch.rand(n, 1, 1, 1, device=images.device)
    mixed = torch.lerp(images[n : 2 * n], images[2 * n : 3 * n], weight)
    return torch.cat([_blur(images[:n], sigma), mixed, images[2 * n :]])


def train_vae(
    pipeline: ToyPipeline, data: Dataset, seconds: float, settings: Settings
) -> dict[str, Any]:
    """L1 on the image and on its differences, plus a small KL; then the scaling factor."""
    vae, device = pipeline.vae.train(), data.images.device
    vae.to(memory_format=torch.channels_last)
    optim = MasterAdamW([vae], weight_decay=1e-4, ema_decay=0.998, low=settings.low_precision)
    dtype = next(vae.parameters()).dtype
    n_train = len(data) - settings.n_holdout
    forward = _compiled(_vae_loss, settings)
    budget = Budget("vae", seconds, VAE_LR, settings.max_steps)
    while budget.running:
        index = torch.randint(n_train, (settings.vae_batch,), device=device)
        images = _roughen(data.batch_images(index)) * 2.0 - 1.0
        loss, l1, kl = forward(vae, images.to(dtype), images)
        loss.backward()
        optim.step(budget.lr)
        budget.note(l1=l1, kl=kl)
    optim.ema_to_model()
    vae.eval()
    mean, std = encode_images(pipeline, data, min(SCALE_IMAGES, len(data)))
    spread = float((mean.float().var() + std.float().square().mean()).sqrt())
    vae.register_to_config(scaling_factor=1.0 / spread)
    return {**budget.summary(), "psnr_holdout_db": vae_psnr(pipeline, data, settings)}


def _vae_loss(vae: Any, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moments = vae.quant_conv(vae.encoder(images))
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
    out = vae.decoder(vae.post_quant_conv(z.to(images.dtype))).float()
    l1 = (out - target).abs().mean()
    edges = sum(((out.diff(dim=d)) - (target.diff(dim=d))).abs().mean() for d in (2, 3))
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return l1 + EDGE_WEIGHT * edges + KL_WEIGHT * kl, l1, kl


@torch.no_grad()
def vae_psnr(pipeline: ToyPipeline, data: Dataset, settings: Settings) -> float:
    """Peak signal-to-noise ratio on held-out images, dB, of the posterior's mode."""
    n = min(256, settings.n_holdout)
    index = torch.arange(len(data) - n, len(data), device=data.images.device)
    images = data.batch_images(index)
    mode = pipeline.vae.encode(images * 2.0 - 1.0).latent_dist.mode()
    out = (pipeline.vae.decode(mode).sample * 0.5 + 0.5).clamp(0, 1)
    return float(-10.0 * torch.log10(F.mse_loss(out, images)))


@torch.no_grad()
def encode_images(pipeline: ToyPipeline, data: Dataset, n: int) -> tuple[Tensor, Tensor]:
    """Posterior means and deviations of n images, two [n, 4, 16, 16] f16, unscaled.

    The images are spread evenly over the set, which is ordered by kind; n = len(data) is all.
    """
    stride = len(data) // n
    mean = torch.empty(n, 4, 16, 16, dtype=torch.float16, device=data.images.device)
    std = torch.empty_like(mean)
    for start in range(0, n, 1024):
        index = torch.arange(start, min(start + 1024, n), device=mean.device)
        posterior = pipeline.vae.encode(data.batch_images(index * stride) * 2.0 - 1.0).latent_dist
        mean[index] = posterior.mean.half()
        std[index] = posterior.std.half()
    return mean, std


def alphas_cumprod(device: torch.device | str) -> Tensor:
    """[1000] f32 of the pipeline's schedule (methods.md A)."""
    start, end = SCHEDULER["beta_start"], SCHEDULER["beta_end"]
    steps = SCHEDULER["num_train_timesteps"]
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, 0).float().to(device)


def train_unet(
    pipeline: ToyPipeline,
    data: Dataset,
    seconds: float,
    settings: Settings,
    snapshot: Callable[[dict[str, dict[str, Tensor]]], None] | None = None,
) -> dict[str, Any]:
    """Epsilon prediction; the text encoder learns with the denoiser.

    `snapshot` gets both networks' averaged weights every SNAPSHOT_S seconds, so that a training
    that is cut off leaves something.
    """
    device, n_train = data.images.device, len(data) - settings.n_holdout
    mean, std = encode_images(pipeline, data, len(data))
    unet = pipeline.unet.train().to(memory_format=torch.channels_last)
    text = pipeline.text_encoder.train()
    optim = MasterAdamW(
        [unet, text], weight_decay=0.01, ema_decay=0.9993, low=settings.low_precision
    )
    dtype = next(unet.parameters()).dtype
    compiled = _compiled(unet, settings)
    levels = alphas_cumprod(device)
    null = torch.tensor(_null_tokens(pipeline), device=device)
    scale, b = float(pipeline.vae.config.scaling_factor), settings.unet_batch
    budget = Budget("unet", seconds, settings.unet_lr, settings.max_steps)
    last_snapshot = 0.0
    while budget.running:
        if snapshot and budget.elapsed - last_snapshot > SNAPSHOT_S:
            last_snapshot = budget.elapsed
            unet_state, text_state = optim.averaged_states()
            snapshot({"unet": unet_state, "text_encoder": text_state})
        index = torch.randint(n_train, (b,), device=device)
        z = mean[index].float() + std[index].float() * torch.randn(b, 4, 16, 16, device=device)
        z = (z * scale).contiguous(memory_format=torch.channels_last)
        t = torch.randint(len(levels), (b,), device=device)
        t = torch.where(torch.rand(b, device=device) < LOW_T_SHARE, t * LOW_T // len(levels), t)
        noise = torch.randn_like(z)
        a = levels[t][:, None, None, None]
        noisy = a.sqrt() * z + (1.0 - a).sqrt() * noise
        column = torch.where(torch.rand(b, device=device) < NO_SUFFIX, NO_VIEW, data.views[index])
        ids = data.tokens[data.objects[index], column]
        ids = torch.where((torch.rand(b, device=device) < CAPTION_DROPOUT)[:, None], null, ids)
        loss = F.mse_loss(_denoise(compiled, text, noisy.to(dtype), t, ids).float(), noise)
        loss.backward()
        optim.step(budget.lr)
        budget.note(loss=loss)
    optim.ema_to_model()
    unet.eval()
    text.eval()
    return {**budget.summary(), "loss_holdout": unet_losses(pipeline, data, mean, settings)}


def _denoise(unet: Any, text: Any, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
    return unet(noisy, t, text(ids).last_hidden_state).sample


def _null_tokens(pipeline: ToyPipeline) -> list[int]:
    from .tokenizer import token_ids

    return token_ids(pipeline.tokenizer, [""])[0].tolist()


@torch.no_grad()
def unet_losses(
    pipeline: ToyPipeline, data: Dataset, mean: Tensor, settings: Settings
) -> dict[str, float]:
    """Epsilon MSE on held-out images at fixed time steps, with full captions."""
    device, n = data.images.device, min(512, settings.n_holdout)
    index = torch.arange(len(data) - n, len(data), device=device)
    gen = torch.Generator(device).manual_seed(1)
    z = mean[index].float() * float(pipeline.vae.config.scaling_factor)
    noise = torch.randn(z.shape, generator=gen, device=device)
    ids = data.tokens[data.objects[index], data.views[index]]
    losses = {}
    for step in (20, 100, 250, 500, 750, 980):
        a = alphas_cumprod(device)[step]
        t = torch.full((n,), step, device=device)
        noisy = a.sqrt() * z + (1.0 - a).sqrt() * noise
        out = _denoise(pipeline.unet, pipeline.text_encoder, noisy, t, ids)
        losses[str(step)] = float(F.mse_loss(out, noise))
    return losses


def _augment(images: Tensor) -> Tensor:
    """Blur, noise, small zoom and shift, gain: NeRF renderings should score sensibly too."""
    b, device = images.shape[0], images.device
    theta = torch.zeros(b, 2, 3, device=device)
    zoom = 0.85 + 0.4 * torch.rand(b, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = 0.2 * (torch.rand(b, 2, device=device) - 0.5)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    half = b // 2
    sigma = 0.3 + 1.7 * float(torch.rand(()))
    images = torch.cat([_blur(images[:half], sigma), images[half:]]) if half else images
    gain = 0.75 + 0.4 * torch.rand(b, 1, 1, 1, device=device)
    noise = 0.08 * torch.rand(b, 1, 1, 1, device=device) * torch.randn_like(images)
    return (images * gain + noise).clamp(0.0, 1.0)


def train_scorer(
    pipeline: ToyPipeline, data: Dataset, seconds: float, settings: Settings
) -> dict[str, Any]:
    """Contrastive loss; every text of the batch that is true of an image counts as its match."""
    scorer, device = pipeline.scorer.train(), data.images.device
    n_train = len(data) - settings.n_holdout
    optim = MasterAdamW([scorer], weight_decay=0.02, ema_decay=0.998, low=False)
    budget = Budget("scorer", seconds, SCORER_LR, settings.max_steps)
    while budget.running:
        index = torch.randint(n_train, (settings.scorer_batch,), device=device)
        with torch.no_grad():
            images = _augment(data.batch_images(index))
        views, objects = data.views[index], data.objects[index]
        bare = torch.rand(len(index), device=device) < 0.7
        ids = data.tokens[objects, torch.where(bare, NO_VIEW, views)]
        true = (objects[:, None] == objects) & (bare | (views[:, None] == views))
        logits = scorer.log_scale.clamp(max=4.6).exp() * (
            scorer.embed_images(images) @ scorer.embed_tokens(ids).T
        )
        hidden = logits.masked_fill(~true, float("-inf"))
        by_text, by_image = ((logits.logsumexp(d) - hidden.logsumexp(d)).mean() for d in (0, 1))
        loss = 0.5 * (by_text + by_image)
        loss.backward()
        optim.step(budget.lr)
        budget.note(loss=loss)
    optim.ema_to_model()
    scorer.eval()
    return {**budget.summary(), "top1_holdout": scorer_accuracy(pipeline, data, settings)}


@torch.no_grad()
def scorer_accuracy(pipeline: ToyPipeline, data: Dataset, settings: Settings) -> float:
    """Share of held-out images whose own caption beats all other captions of the hold-out."""
    n = min(512, settings.n_holdout)
    index = torch.arange(len(data) - n, len(data), device=data.images.device)
    objects, row = data.objects[index].unique(return_inverse=True)
    texts = pipeline.scorer.embed_tokens(data.tokens[objects, NO_VIEW])
    best = (pipeline.scorer.embed_images(data.batch_images(index)) @ texts.T).argmax(1)
    return float((best == row).float().mean())
