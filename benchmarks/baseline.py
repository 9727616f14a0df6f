"""The same step as the official code computes it (threestudio's SDI system; methods.md C and D).

Cameras and rays on the CPU, copied; nerfacc's sampling and compositing around f32 MLPs in PyTorch
with normals by autograd (peers.NerfaccPeer; hash grid of tinycudann, else peers.HalfGrid);
diffusers' VAE and UNet, eager and in f16; losses in PyTorch, each read with .item() to be logged;
torch.optim.Adam over f32 parameters; the occupancy grid every 16 steps. Where nerfacc cannot be
had the PyTorch twin of the renderer stands in for it, and `notes` says so. The official trainer's
loss scaling is left out: our encoder scales its own gradient.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peers import NerfaccPeer, import_nerfacc, import_tinycudann
from torch import Tensor

from sdi_fast import reference
from sdi_fast.camera import camera_to, sample_cameras
from sdi_fast.config import Config
from sdi_fast.constants import NORMALIZE_EPS
from sdi_fast.diffusion.pipeline import Pipeline
from sdi_fast.diffusion.schedule import annealed_timestep, draw_delta
from sdi_fast.field import EnvironmentBackground, NeRFField
from sdi_fast.guidance import SDI
from sdi_fast.losses import RAY_LOSS_NAMES, loss_weights
from sdi_fast.occupancy import OccupancyGrid
from sdi_fast.placement import resolve_device
from sdi_fast.render import choose_shading
from sdi_fast.types import Camera, MarchSpec, RaySums

STAGES = (
    "occupancy and cameras",
    "render forward",
    "VAE forward",
    "inversion and prediction",
    "VAE backward",
    "render backward",
    "losses and optimiser",
)
CAMERAS, RENDER, VAE, INVERSION, VAE_BACK, RENDER_BACK, REST = STAGES


def official(config: Config) -> Config:
    """`config` with nothing of ours in it."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, denoiser="diffusers", encoder="diffusers"),
        guidance=dataclasses.replace(config.guidance, static=False, speed="exact"),
    )


class StageClock:
    """Milliseconds between marks; on a GPU those of its stream, read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, stage: str) -> None:
        """Ends the stage that began at the last mark."""
        self.marks.append((stage, self._now()))

    def read(self) -> dict[str, float]:
        """Milliseconds by stage; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        times = dict.fromkeys(STAGES, 0.0)
        for (_, begin), (stage, end) in zip(self.marks, self.marks[1:], strict=False):
            spent = begin.elapsed_time(end) if self.on_gpu else (end - begin) * 1e3
            times[stage] += spent
        return times


class OfficialPeer(NerfaccPeer):
    """The nerfacc peer with rays that come from the CPU and the official mask of the levels."""

    given: tuple[Tensor, Tensor]  # [R, 3] each
    mask: Tensor  # [L * F]

    def rays(self, camera: Camera) -> tuple[Tensor, Tensor]:
        return self.given

    def encode(self, x: Tensor, table: Any) -> Tensor:
        return super().encode(x, table) * self.mask


class BaselineStep:
    """One engine's worth of it.

    Args:
        config: as an Engine's; what is ours in it is turned off.
        pipeline: a model on diffusers' denoiser and encoder.
    """

    def __init__(self, config: Config, pipeline: Pipeline) -> None:
        self.config = config = official(config)
        self.device = device = resolve_device(config.engine.device)
        self.pipeline = pipeline
        if pipeline.components != {"denoiser": "diffusers", "encoder": "diffusers"}:
            raise ValueError(f"pipeline: expected diffusers' parts, got {pipeline.components}")
        self.prompts = pipeline.prompts.encode(config.prompt)
        self.guidance = SDI(pipeline, config.guidance)
        seed = config.engine.seed
        self.host = torch.Generator().manual_seed(seed)  # cameras, shadings, time steps
        self.generator = torch.Generator(device).manual_seed(seed)
        draws = torch.Generator().manual_seed(seed)
        self.field = NeRFField(config.field, generator=draws, backend="reference").to(device)
        self.background = EnvironmentBackground(generator=draws, backend="reference").to(device)
        self.occupancy = OccupancyGrid(
            config.render, radius=config.field.radius, device=device, backend="reference"
        )
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(self.field.parameters()), "lr": config.optim.lr_field},
                {"params": list(self.background.parameters()), "lr": config.optim.lr_background},
            ],
            betas=config.optim.betas,
            eps=config.optim.eps,
        )
        self.notes: list[str] = []
        self.peer = self._make_peer()
        self.global_step = 0
        self.updates_occupancy = True
        self.log: list[dict[str, float]] = []

    def _make_peer(self) -> OfficialPeer | None:
        on_gpu = self.device.type == "cuda"
        nerfacc, why = import_nerfacc() if on_gpu else (None, "nerfacc needs a CUDA device")
        if nerfacc is None:
            self.notes.append(f"{why}: the PyTorch twin of the renderer stands in for it")
            return None
        tinycudann, why = import_tinycudann()
        if tinycudann is None:
            self.notes.append(f"no tinycudann ({why}): the hash grid is peers.HalfGrid, in PyTorch")
        return OfficialPeer(nerfacc, self.field.spec, self.device, tinycudann)

    def adopt(
        self,
        field: Mapping[str, Tensor],
        background: Mapping[str, Tensor],
        occupancy: dict[str, Tensor],
        step: int,
    ) -> None:
        """Takes over another engine's scene and step, and keeps that occupancy grid."""
        self.field.load_state_dict(dict(field))
        self.background.load_state_dict(dict(background))
        self.occupancy.load_state_dict(occupancy)
        self.global_step, self.updates_occupancy = step, False

    def step(self, t: int | None = None, delta: int | None = None) -> dict[str, Any]:
        """One step.

        Returns:
            "stages", ms by name of STAGES; "loss", the weighted sum; "losses", unweighted, by name;
            "t", "n_samples", "n_unet_calls".
        """
        config, step, clock = self.config, self.global_step, StageClock(self.device)
        if self.updates_occupancy:
            self.occupancy.update(step, self._density, config.render, self.generator)
        camera, rays = self._camera_and_rays()
        clock.mark(CAMERAS)
        shading = choose_shading(step, config.render, self.host)
        sums = self._sums(camera, rays, shading)
        sky = reference.background(rays[1], *self.background.parameters())
        image = (sums.rgb + (1.0 - sums.opacity[:, None]) * sky).view(
            camera.batch_size, camera.height, camera.width, 3
        )
        clock.mark(RENDER)
        if image.requires_grad:
            image.register_hook(lambda grad: clock.mark(VAE_BACK))
        latents = self.pipeline.encoder.encode(
            image.permute(0, 3, 1, 2), self.generator, config.guidance.sample_posterior
        )
        clock.mark(VAE)
        target, level, calls = self._target(latents, camera, step, t, delta)
        clock.mark(INVERSION)
        parts = {"guidance": 0.5 * F.mse_loss(latents, target) / camera.batch_size}
        parts |= self._render_losses(sums, camera)
        weights = loss_weights(config.loss, step)
        total = sum((weights[name] * value for name, value in parts.items()), latents.new_zeros(()))
        logged = {name: value.item() for name, value in parts.items()}
        clock.mark(REST)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        clock.mark(RENDER_BACK)
        self.optimizer.step()
        loss = total.item()
        clock.mark(REST)
        self.global_step += 1
        self.log.append({"loss": loss, **logged})
        return {
            "stages": clock.read(),
            "loss": loss,
            "losses": logged,
            "t": level,
            "n_samples": int(sums.counts[0]),
            "n_unet_calls": calls,
        }

    def _density(self, x: Tensor) -> Tensor:
        levels = self.field.active_levels(self.global_step)
        return reference.density(x, self.field.params(), self.field.spec, levels)

    def _camera_and_rays(self) -> tuple[Camera, tuple[Tensor, Tensor]]:
        camera = sample_cameras(self.config.camera, self.host)
        rays = reference.generate_rays(camera.c2w, camera.fovy, camera.height, camera.width)
        origins, directions = (values.to(self.device) for values in rays)
        return camera_to(camera, self.device), (origins, directions)

    def _sums(self, camera: Camera, rays: tuple[Tensor, Tensor], shading: str) -> RaySums:
        field, render, grid = self.field, self.config.render, self.field.spec.grid
        levels = field.active_levels(self.global_step)
        draw = reference.render_views
        if self.peer is not None:
            self.peer.given = rays
            width = levels * grid.n_features
            mask = torch.arange(grid.n_output_dims, device=self.device) < width
            self.peer.mask = mask.float()
            draw, levels = self.peer.render_views, grid.n_levels
        step_size = render.step_size(field.spec.radius)
        jitter = None
        if self.config.render.randomized:
            u = torch.rand(len(rays[0]), generator=self.generator, device=self.device)
            jitter = u * step_size
        return draw(
            camera,
            field.params(),
            field.spec,
            levels,
            self.occupancy.binary,
            MarchSpec(step_size, render.near, render.early_stop_eps, render.alpha_threshold),
            shading,
            alpha_bound=self.occupancy.mean_tensor(),
            jitter=jitter,
        )

    def _target(
        self, latents: Tensor, camera: Camera, step: int, t: int | None, delta: int | None
    ) -> tuple[Tensor, int, int]:
        """The target, the first view's t, UNet calls."""
        guidance = self.config.guidance
        level = annealed_timestep(
            step,
            self.config.engine.max_steps,
            guidance,
            batch_size=camera.batch_size,
            generator=self.host,
            n_train_steps=self.pipeline.schedule.n_train_steps,
        )
        if t is not None:
            level = torch.full_like(level, t)
        beyond = None if delta is None else torch.full_like(level, delta)
        condition = self.prompts.condition(
            camera.azimuth_deg, camera.elevation_deg, perp_neg=guidance.perp_neg
        )
        # deltas come from the host's generator: one on the GPU would have to be waited for
        if beyond is None:
            n_train = self.pipeline.schedule.n_train_steps
            beyond = draw_delta(len(level), self.host, guidance, n_train)
        out = self.guidance.target(latents.detach(), condition, level, self.generator, delta=beyond)
        return out.target, int(level[0]), out.n_unet_calls

    def _render_losses(self, sums: RaySums, camera: Camera) -> dict[str, Tensor]:
        by_ray = reference.ray_losses(sums.opacity, sums.orient, sums.z_variance).unbind()
        losses = dict(zip(RAY_LOSS_NAMES, by_ray, strict=True))
        unit = F.normalize(sums.normal_sum, dim=-1, eps=NORMALIZE_EPS)
        shape = (camera.batch_size, camera.height, camera.width, -1)
        opacity = sums.opacity[:, None]
        normal = (opacity * (unit + 1.0) / 2.0).view(shape)
        if self.config.loss.convex_frame == "world":
            losses["convex"] = reference.convexity_loss(normal)
        else:
            losses["convex"] = reference.convexity_loss(normal, opacity.view(shape), camera.c2w)
        return losses
