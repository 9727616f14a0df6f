"""The stages of our step, each through its public function, timed apart.

On a GPU a stage's time is the union of its kernels' intervals: launched one by one it would wait
for the host, which the whole step, being one graph or several, does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from baseline import CAMERAS, INVERSION, RENDER, RENDER_BACK, REST, STAGES, VAE, VAE_BACK
from step_trace import busy_ms
from torch import Tensor

from sdi_fast.camera import sample_cameras
from sdi_fast.engine import Engine
from sdi_fast.losses import loss_weights, render_losses
from sdi_fast.types import Camera, RenderOutput

SHADING = "albedo"  # of the first steps
DELTA = 37


class Stages:
    """One step of `engine` in pieces; each leaves what the next ones take."""

    camera: Camera
    output: RenderOutput
    images: Tensor
    latents: Tensor
    image_grad: Tensor
    grads: tuple[Tensor, ...]

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.step = engine.global_step
        self.host = torch.Generator().manual_seed(0)
        self.generator = torch.Generator(engine.device).manual_seed(0)
        self.parameters = [*engine.field.parameters(), *engine.background.parameters()]

    def update_occupancy(self) -> None:
        engine = self.engine

        def density(x: Tensor) -> Tensor:
            return engine.field.density(x, self.step)

        engine.occupancy.update(0, density, engine.config.render, self.generator)

    def draw_camera(self) -> None:
        self.camera = sample_cameras(self.engine.config.camera, self.host, self.engine.device)

    def render(self) -> None:
        engine = self.engine
        self.output = engine.renderer.render(
            engine.field,
            engine.background,
            engine.occupancy,
            self.camera,
            self.step,
            SHADING,
            jitter=engine.renderer.draw_jitter(len(engine.buffers.jitter), self.generator),
        )

    def encode(self) -> None:
        self.images = self.output.comp_rgb.detach().permute(0, 3, 1, 2).requires_grad_()
        sample = self.engine.config.guidance.sample_posterior
        self.latents = self.engine.pipeline.encoder.encode(self.images, self.generator, sample)

    def invert(self, t: int) -> None:
        engine, camera = self.engine, self.camera
        condition = engine.prompts.condition(
            camera.azimuth_deg, camera.elevation_deg, perp_neg=engine.config.guidance.perp_neg
        )
        level = torch.full((camera.batch_size,), t)
        engine.guidance.target(
            self.latents.detach(),
            condition,
            level,
            self.generator,
            delta=torch.full_like(level, DELTA),
        )  # type: ignore[call-arg]

    def encode_backward(self) -> None:
        cotangent = torch.ones_like(self.latents)
        (grad,) = torch.autograd.grad(self.latents, self.images, cotangent, retain_graph=True)
        self.image_grad = grad.permute(0, 2, 3, 1)

    def losses(self) -> Tensor:
        engine = self.engine
        loss = engine.config.loss
        parts = render_losses(self.output, self.camera, loss, backend=engine.renderer.backend)
        weights = loss_weights(loss, self.step)
        return torch.stack([weights[name] * value for name, value in parts.items()]).sum()

    def render_backward(self, total: Tensor) -> None:
        outputs = [total, self.output.comp_rgb]
        cotangents = [torch.ones_like(total), self.image_grad]
        self.grads = torch.autograd.grad(
            outputs, self.parameters, cotangents, retain_graph=True, allow_unused=True
        )

    def optimise(self) -> None:
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        self.engine.optimizer.step()


def measure_stages(engine: Engine, t_steps: tuple[int, ...], calls: int = 3) -> dict[str, Any]:
    """Milliseconds by stage and by t; what could not be measured alone is named in "missing"."""
    stages, missing = Stages(engine), {}
    times: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    every = engine.config.render.occupancy_every
    total: list[Tensor] = []

    def losses() -> None:
        total[:] = [stages.losses()]

    plan: list[tuple[str, float, Callable[[], Any]]] = [
        (CAMERAS, 1.0 / every, stages.update_occupancy),
        (CAMERAS, 1.0, stages.draw_camera),
        (RENDER, 1.0, stages.render),
        (VAE, 1.0, stages.encode),
        (VAE_BACK, 1.0, stages.encode_backward),
        (REST, 1.0, losses),
        (RENDER_BACK, 1.0, lambda: stages.render_backward(total[0])),
        (REST, 1.0, stages.optimise),
    ]
    for name, share, function in plan:
        try:
            times[name] += share * stage_ms(engine.device, function, calls)
        except Exception as error:  # another engine's piece: the others are still worth having
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    inversions = {}
    for t in t_steps:
        try:
            inversions[t] = stage_ms(engine.device, lambda t=t: stages.invert(t), calls)
        except Exception as error:
            missing[f"{INVERSION}, t = {t}"] = f"{type(error).__name__}: {error}".splitlines()[0]
    by_t = {str(t): {**times, INVERSION: ms} for t, ms in inversions.items()}
    return {"stages_ms": by_t, "missing": missing}


def stage_ms(device: torch.device, function: Callable[[], Any], calls: int) -> float:
    """Of one call, after one to warm up; without that where `calls` is 1, a smoke run."""
    if calls > 1 or device.type == "cuda":
        function()
    if device.type == "cuda":
        return busy_ms(function, calls)[0]
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)
