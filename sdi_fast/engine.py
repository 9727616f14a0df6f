"""The loop: Engine.step() passes data through the stages in order (design.md, the way of the data).

One CPU generator feeds every random draw of a run, so that a run is fixed by its config and a
resumed run continues the same stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .camera import camera_to, sample_cameras
from .config import Config, EngineConfig
from .constants import MAX_BAD_STEPS
from .diffusion.pipeline import Pipeline, load_pipeline
from .diffusion.schedule import annealed_timestep
from .field import EnvironmentBackground, NeRFField
from .guidance import make_guidance
from .losses import loss_weights, render_losses
from .occupancy import OccupancyGrid
from .optim import Adam
from .render import Renderer, choose_shading
from .types import Camera, RenderOutput, SDIFastError


class NonFiniteError(RuntimeError):
    """Raised after `MAX_BAD_STEPS` consecutive steps whose loss or gradient was not finite."""


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one step reports; plain numbers, no tensors."""

    step: int  # 0-based index of the step that was done
    loss: float  # weighted sum; NaN where the step was skipped for it
    t: int  # diffusion time step of the first view
    losses: dict[str, float]  # unweighted, by name
    n_samples: int  # samples that survived pruning
    n_unet_calls: int
    skipped: bool  # True: not finite, parameters unchanged
    seconds: float


class Callback(Protocol):
    """Called after every step."""

    def __call__(self, engine: Engine, metrics: StepMetrics) -> None: ...


HISTORY_COLUMNS = ("loss", "t", "n_samples", "skipped", "seconds")


def resolve_device(name: str) -> torch.device:
    """`name` as a device; "auto" prefers CUDA. Raises SDIFastError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SDIFastError(
            f'device: expected "auto", "cpu", "cuda" or "cuda:N", got {name!r}'
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise SDIFastError(f'device: expected "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SDIFastError(
            f"device: {name!r} is not there; this machine has "
            f"{torch.cuda.device_count()} CUDA device(s)"
        )
    return device


def choose_backend(config: EngineConfig, device: torch.device) -> str:
    """The ops' backend. In deterministic mode "auto" means PyTorch on a GPU: our kernels add the
    table's gradients in whatever order their blocks come."""
    if config.deterministic and device.type == "cuda" and config.backend == "auto":
        return "reference"
    return config.backend


class Engine:
    """Optimises one NeRF against a frozen diffusion model.

    Args:
        config: the whole run, prompt included.
        pipeline: an already loaded model, to share between engines; loaded from `config.model`
            where None.

    Raises:
        SDIFastError: for a bad setting, a missing device or a missing model.
    """

    def __init__(self, config: Config, *, pipeline: Pipeline | None = None) -> None:
        self.config = config
        self.device = resolve_device(config.engine.device)
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        self.pipeline = pipeline or load_pipeline(config.model, self.device)
        self.prompts = self.pipeline.prompts.encode(
            config.prompt, negative_prompt=config.guidance.negative_prompt
        )
        self.guidance = make_guidance(self.pipeline, config.guidance)

        backend = choose_backend(config.engine, self.device)
        self.backend = backend
        self.generator = torch.Generator("cpu").manual_seed(config.engine.seed)
        self.field = NeRFField(config.field, generator=self.generator, backend=backend).to(
            self.device
        )
        self.background = EnvironmentBackground(generator=self.generator, backend=backend).to(
            self.device
        )
        self.renderer = Renderer(config.field, config.render, backend=backend)
        self.occupancy = OccupancyGrid(
            config.render, radius=config.field.radius, device=self.device, backend=backend
        )
        self.optimizer = Adam(
            {
                "field": (dict(self.field.named_parameters()), config.optim.lr_field),
                "background": (
                    dict(self.background.named_parameters()),
                    config.optim.lr_background,
                ),
            },
            betas=config.optim.betas,
            eps=config.optim.eps,
            backend=backend,
        )
        self.global_step = 0
        self.bad_steps = 0  # consecutive
        self.history: list[dict[str, float]] = []
        self._stop = False

    @property
    def ran(self) -> dict[str, Any]:
        """Which of the possible implementations compute; for metrics.json."""
        guidance = self.config.guidance
        shortcuts = dataclasses.asdict(guidance.shortcuts)
        return {**self.pipeline.components, "static": guidance.static, **shortcuts}

    # ---- one step -------------------------------------------------------------------------

    def step(self) -> StepMetrics:
        """One optimisation step (methods.md C and D).

        Raises:
            NonFiniteError: when this is the `MAX_BAD_STEPS`-th bad step in a row.
        """
        started = time.perf_counter()
        step, config = self.global_step, self.config
        with self._determinism():
            self.occupancy.update(step, self._occupancy_density, config.render, self.generator)
            camera = sample_cameras(config.camera, self.generator, self.device)
            shading = choose_shading(step, config.render, self.generator)
            output = self._render(camera, step, shading, self.generator)
            loss, parts, t, n_calls = self._loss(output, camera, step)
            self.optimizer.zero_grad()
            loss.backward()
            value = float(loss.detach())
            skipped = not (math.isfinite(value) and self.optimizer.grads_are_finite())
            if not skipped:
                self.optimizer.step()
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        self.global_step += 1
        metrics = StepMetrics(
            step=step,
            loss=value,
            t=t,
            losses=parts,
            n_samples=int(output.n_samples),
            n_unet_calls=n_calls,
            skipped=skipped,
            seconds=time.perf_counter() - started,
        )
        self.history.append({name: float(getattr(metrics, name)) for name in HISTORY_COLUMNS})
        if self.bad_steps >= MAX_BAD_STEPS:
            raise NonFiniteError(
                f"the loss or its gradient was not finite in {self.bad_steps} steps in a row "
                f"(the last: step {step}, loss {value}); the parameters are those of step "
                f"{step - self.bad_steps + 1}"
            )
        return metrics

    def _loss(
        self, output: RenderOutput, camera: Camera, step: int
    ) -> tuple[Tensor, dict[str, float], int, int]:
        """Weighted loss, its unweighted parts, the first view's t, UNet calls."""
        config = self.config
        images = output.comp_rgb.permute(0, 3, 1, 2)  # [B, 3, H, W]
        latents = self.pipeline.encoder.encode(
            images, generator=self.generator, sample=config.guidance.sample_posterior
        )
        t = annealed_timestep(
            step,
            config.engine.max_steps,
            config.guidance,
            batch_size=camera.batch_size,
            generator=self.generator,
            n_train_steps=self.pipeline.schedule.n_train_steps,
        )  # stays on the CPU: the inversion's path is planned there
        condition = self.prompts.condition(
            camera.azimuth_deg, camera.elevation_deg, perp_neg=config.guidance.perp_neg
        )
        guided = self.guidance.target(latents.detach(), condition, t, self.generator)
        parts = {"guidance": self.guidance.loss(latents, guided)}
        parts.update(render_losses(output, camera, config.loss, step, backend=self.backend))
        weights = loss_weights(config.loss, step)
        total = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
        scalars = {name: float(value.detach()) for name, value in parts.items()}
        return total, scalars, int(t[0]), guided.n_unet_calls

    def _render(
        self, camera: Camera, step: int, shading: str, generator: torch.Generator | None
    ) -> RenderOutput:
        return self.renderer.render(
            self.field,
            self.background,
            self.occupancy,
            camera,
            step,
            shading,
            jitter_generator=generator,
        )

    def _occupancy_density(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.field.density(x, self.global_step)

    @contextlib.contextmanager
    def _determinism(self) -> Iterator[None]:
        """torch's deterministic algorithms for the length of a step, where asked for."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.config.engine.deterministic or before)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    # ---- the loop -------------------------------------------------------------------------

    def run(self, *, callbacks: Sequence[Callback] = (), until: int | None = None) -> None:
        """Steps to `until` (default: the config's max_steps), or until `request_stop()`.

        Args:
            callbacks: each is called as callback(engine, metrics) after every step.
            until: global step at which to return.
        """
        end = self.config.engine.max_steps if until is None else until
        self._stop = False
        while self.global_step < end and not self._stop:
            metrics = self.step()
            for callback in callbacks:
                callback(self, metrics)

    def request_stop(self) -> None:
        """Makes `run` return after the step in hand; safe to call from a callback."""
        self._stop = True

    # ---- what the result is read through --------------------------------------------------

    @torch.no_grad()
    def render(self, camera: Camera, shading: str = "albedo") -> RenderOutput:
        """Images of `camera`'s views as the field stands, on the engine's device; no jitter, no
        gradient."""
        return self._render(camera_to(camera, self.device), self.global_step, shading, None)

    @torch.no_grad()
    def density(self, x: Tensor) -> Tensor:
        """Density [M] in 1/scene unit at world points x [M, 3]."""
        return self.field.density(x.to(self.device), self.global_step)

    @torch.no_grad()
    def albedo(self, x: Tensor) -> Tensor:
        """Albedo [M, 3] in [0, 1] at world points x [M, 3]."""
        return self.field(x.to(self.device), self.global_step)[1]

    # ---- state ----------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as flat CPU tensors fit for safetensors."""
        state = {f"field.{k}": v for k, v in self.field.state_dict().items()}
        state.update({f"background.{k}": v for k, v in self.background.state_dict().items()})
        state.update({f"optimizer.{k}": v for k, v in self.optimizer.state_dict().items()})
        state.update({f"occupancy.{k}": v for k, v in self.occupancy.state_dict().items()})
        state["engine.generator"] = self.generator.get_state()
        state["engine.counters"] = torch.tensor([self.global_step, self.bad_steps])
        rows = [[row[name] for name in HISTORY_COLUMNS] for row in self.history]
        state["engine.history"] = torch.tensor(rows, dtype=torch.float64).reshape(
            -1, len(HISTORY_COLUMNS)
        )
        return {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over a state of `state_tensors()`.

        Raises:
            SDIFastError: for a missing or superfluous tensor or a shape of another config; the
                engine is unchanged then.
        """
        own = self.state_tensors()
        if tensors.keys() != own.keys():
            odd = sorted(tensors.keys() ^ own.keys())[0]
            raise SDIFastError(f"checkpoint: tensor {odd!r} is missing or not expected")
        for name, value in own.items():
            if name != "engine.history" and value.shape != tensors[name].shape:
                raise SDIFastError(
                    f"checkpoint: {name}: expected shape {tuple(value.shape)}, "
                    f"got {tuple(tensors[name].shape)}"
                )

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.field.load_state_dict(part("field."))
        self.background.load_state_dict(part("background."))
        self.optimizer.load_state_dict(part("optimizer."))
        self.occupancy.load_state_dict(part("occupancy."))
        self.generator.set_state(tensors["engine.generator"])
        self.global_step, self.bad_steps = (int(v) for v in tensors["engine.counters"])
        rows = tensors["engine.history"].tolist()
        self.history = [dict(zip(HISTORY_COLUMNS, row, strict=True)) for row in rows]
