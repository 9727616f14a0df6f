"""The loop: Engine.step() passes data through the stages in order (design.md, the way of the data).

The host draws what decides what runs (views, shading, time step) from a CPU generator, and queues
the step; the GPU draws the noise from a generator of its own and never waits for the host, which
reads a step's numbers some steps later. On the CPU one generator feeds every draw. So a run is
fixed by its config and kind of device, and a resumed run continues the same streams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .camera import camera_to, sample_cameras
from .config import Config
from .constants import MAX_BAD_STEPS
from .diffusion.modules import cudnn_benchmark
from .diffusion.pipeline import Pipeline, load_pipeline
from .diffusion.schedule import annealed_timestep, draw_delta, draw_normal
from .field import EnvironmentBackground, NeRFField
from .guidance import Guidance, GuidanceOutput, make_guidance
from .losses import loss_weights
from .occupancy import OccupancyGrid
from .optim import Adam
from .placement import choose_backend, resolve_device, settle_guidance
from .readback import PendingMetrics, Reading, Snapshot, StepMetrics
from .render import Renderer, choose_shading
from .step import ROW_NAMES, GraphHome, Scene, StepBuffers, StepGraphs, StepHalves, run_eagerly
from .types import Camera, RenderOutput, SDIFastError

STEPS_AHEAD = 3  # that a GPU is given before the host waits for the first of them


class NonFiniteError(RuntimeError):
    """Raised after `MAX_BAD_STEPS` consecutive steps whose loss or gradient was not finite.

    The engine changes nothing from then on, until a state is loaded.
    """


class Callback(Protocol):
    """Called after every step."""

    def __call__(self, engine: Engine, metrics: StepMetrics) -> None: ...


HISTORY_COLUMNS = ("loss", "t", "n_samples", "skipped", "seconds")


class Engine:
    """Optimises one NeRF against a frozen diffusion model.

    Args:
        config: the whole run, prompt included.
        pipeline: an already loaded model, to share between engines; loaded from `config.model`
            where None.
        guidance: likewise, of `config.guidance`; engines that share one share its CUDA graphs.
        home: likewise; engines that share one share the memory of their steps' CUDA graphs, and
            have to be stepped in turn by one thread.

    Raises:
        SDIFastError: for a bad setting, a missing device or a missing model.
    """

    def __init__(
        self,
        config: Config,
        *,
        pipeline: Pipeline | None = None,
        guidance: Guidance | None = None,
        home: GraphHome | None = None,
    ) -> None:
        self.config = config
        self.device = resolve_device(config.engine.device)
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        if config.engine.deterministic and self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may not repeat
        self.pipeline = pipeline or load_pipeline(config.model, self.device)
        self.prompts = self.pipeline.prompts.encode(
            config.prompt, negative_prompt=config.guidance.negative_prompt
        )
        self.guidance = guidance or make_guidance(
            self.pipeline, settle_guidance(config.guidance, self.device)
        )
        self.backend = choose_backend(config, self.device)
        # what the host has to know (views, shading, t, delta), and noise
        self.generator = torch.Generator("cpu").manual_seed(config.engine.seed)
        self.noise = self.generator
        if self.device.type == "cuda":
            self.noise = torch.Generator(self.device).manual_seed(config.engine.seed)
        self.scene = self._make_scene()
        self.buffers = StepBuffers(config.camera, self._latent_shape(), self.device)
        self.halves = StepHalves(
            config, self.scene, self.pipeline, self.guidance, self.buffers, self.backend
        )
        self.home = home
        if home is None and self.device.type == "cuda":
            self.home = GraphHome(self.device)
        self._stream = None if self.home is None else self.home.stream
        self.graphs = self._make_graphs()
        self.global_step = 0
        self._history: list[dict[str, float]] = []
        self._pending: deque[PendingMetrics] = deque()
        self._bad_steps = 0
        self._stop = False

    def _make_scene(self) -> Scene:
        config, backend = self.config, self.backend
        field = NeRFField(config.field, generator=self.generator, backend=backend).to(self.device)
        background = EnvironmentBackground(generator=self.generator, backend=backend)
        background = background.to(self.device)
        groups = {
            "field": (dict(field.named_parameters()), config.optim.lr_field),
            "background": (dict(background.named_parameters()), config.optim.lr_background),
        }
        return Scene(
            field=field,
            background=background,
            renderer=Renderer(
                config.field,
                config.render,
                backend=backend,
                deterministic=config.engine.deterministic,
            ),
            occupancy=OccupancyGrid(
                config.render, radius=config.field.radius, device=self.device, backend=backend
            ),
            optimizer=Adam(groups, betas=config.optim.betas, eps=config.optim.eps, backend=backend),
        )

    def _latent_shape(self) -> tuple[int, int, int, int]:
        size = self.pipeline.sample_size
        return (self.config.camera.batch_size, self.pipeline.latent_channels, size, size)

    def _make_graphs(self) -> StepGraphs | None:
        """The step's CUDA graphs, where the config wants them and the shapes allow them."""
        wanted = self.config.engine.graphs
        fused = self._is_fused()
        if wanted and not fused:
            raise SDIFastError(
                'engine.graphs: true needs the fused renderer (a CUDA device, backend "auto" or '
                f'"cuda", render.precision "auto" or "fp16"), got device {self.device}, backend '
                f"{self.backend!r}, precision {self.config.render.precision!r}"
            )
        if wanted is False or not fused or self.home is None:
            return None
        return StepGraphs(self.halves, self.home)

    # the scene's parts, by the names that other tools know them by
    field = property(lambda self: self.scene.field)
    background = property(lambda self: self.scene.background)
    renderer = property(lambda self: self.scene.renderer)
    occupancy = property(lambda self: self.scene.occupancy)
    optimizer = property(lambda self: self.scene.optimizer)

    @property
    def ran(self) -> dict[str, Any]:
        """Which of the possible implementations compute; for metrics.json."""
        guidance = self.config.guidance
        shortcuts = dataclasses.asdict(guidance.shortcuts)
        return {
            **self.pipeline.components,
            "unet_linears": self.pipeline.denoiser.linears,
            "renderer": "fused" if self._is_fused() else "ops",
            "graphs": self.graphs is not None,
            "static": getattr(self.guidance, "static", False),
            **shortcuts,
        }

    def _is_fused(self) -> bool:
        return self.scene.renderer.is_fused(self.scene.field, self.buffers.camera.c2w)

    # ---- one step -------------------------------------------------------------------------

    def step(self, t: int | None = None, delta: int | None = None) -> StepMetrics:
        """One optimisation step (methods.md C and D).

        On a GPU it is queued, and the metrics' numbers wait for it when they are read; the host
        stays at most `STEPS_AHEAD` steps ahead.

        Args:
            t: the time step of all views, instead of the annealed one; for benchmarks and tests.
            delta: how far beyond t SDI inverts, instead of a drawn one.

        Raises:
            NonFiniteError: when this step, or on a GPU one of the `STEPS_AHEAD` before it, was the
                `MAX_BAD_STEPS`-th bad one in a row. No parameter has changed since the first.
        """
        started = time.perf_counter()
        self._settle(STEPS_AHEAD - 1)
        step = self.global_step
        with self._determinism(), self._on_stream(), cudnn_benchmark():
            shading = self._draw(step)
            if self.graphs is not None:
                running = self.graphs.run(step, shading)
            else:
                running = run_eagerly(self.halves, step, shading)
            guided = self._target(running.latents, step, t, delta)
            running.finish(guided)
            reading = Reading(self.buffers.row, ROW_NAMES)
        self.global_step += 1
        seconds = time.perf_counter() - started
        metrics = PendingMetrics(step, int(guided.t[0]), guided.n_unet_calls, seconds, reading)
        self._pending.append(metrics)
        if self._stream is not None:
            return metrics
        self._settle(0)
        return metrics.settled()

    def _draw(self, step: int) -> str:
        """Fills the buffers with the step's views, weights and noise; the shading."""
        config, buffers = self.config, self.buffers
        self.occupancy.update(step, self._occupancy_density, config.render, self.noise)
        camera = sample_cameras(config.camera, self.generator)
        shading = choose_shading(step, config.render, self.generator)
        buffers.load(camera, loss_weights(config.loss, step))
        if config.render.randomized:
            buffers.jitter.copy_(self.renderer.draw_jitter(len(buffers.jitter), self.noise))
        if config.guidance.sample_posterior:
            shape = buffers.posterior.shape
            buffers.posterior.copy_(draw_normal(shape, self.noise, buffers.posterior))
        return shading

    def _target(
        self, latents: Tensor, step: int, t: int | None, delta: int | None
    ) -> GuidanceOutput:
        config, batch = self.config, latents.shape[0]
        n_train_steps = self.pipeline.schedule.n_train_steps
        level = annealed_timestep(
            step,
            config.engine.max_steps,
            config.guidance,
            batch_size=batch,
            generator=self.generator,
            n_train_steps=n_train_steps,
        )  # on the CPU: the inversion's path is planned there
        if t is not None:
            level = torch.full((batch,), t)
        camera = self.buffers.camera
        condition = self.prompts.condition(
            camera.azimuth_deg, camera.elevation_deg, perp_neg=config.guidance.perp_neg
        )
        if config.guidance.method != "sdi":
            return self.guidance.target(latents, condition, level, self.noise)
        beyond = draw_delta(batch, self.generator, config.guidance, n_train_steps)
        if delta is not None:
            beyond = torch.full((batch,), delta)
        sdi: Any = self.guidance  # which alone has a delta
        return sdi.target(latents, condition, level, self.noise, delta=beyond)

    def _settle(self, n_left: int) -> None:
        """Reads the numbers of queued steps, oldest first, until `n_left` are left."""
        while len(self._pending) > n_left:
            metrics = self._pending[0].settled()
            self._pending.popleft()  # not before: the wait may be interrupted
            self._bad_steps = metrics.bad_steps
            self._history.append({name: float(getattr(metrics, name)) for name in HISTORY_COLUMNS})
            if metrics.bad_steps >= MAX_BAD_STEPS:
                self._pending.clear()  # those have changed nothing
                self.global_step = metrics.step + 1
                raise NonFiniteError(
                    f"the loss or its gradient was not finite in {metrics.bad_steps} steps in a "
                    f"row (the last: step {metrics.step}, loss {metrics.loss}); the parameters are "
                    f"those of step {metrics.step - metrics.bad_steps + 1}"
                )

    def settle(self) -> None:
        """Waits for the steps that are queued; raises NonFiniteError as `step` does."""
        self._settle(0)

    @property
    def history(self) -> list[dict[str, float]]:
        """A row of numbers a step; waits for the steps that are queued."""
        self._settle(0)
        return self._history

    @property
    def bad_steps(self) -> int:
        """Steps in a row, up to now, that were skipped; waits for those that are queued."""
        self._settle(0)
        return self._bad_steps

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

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """The engine's own stream, in order with the caller's, on which graphs are captured."""
        if self._stream is None:
            yield
            return
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # a step that is broken off has queued work as well
            outer.wait_stream(self._stream)

    # ---- the loop -------------------------------------------------------------------------

    def run(self, *, callbacks: Sequence[Callback] = (), until: int | None = None) -> None:
        """Steps to `until` (default: the config's max_steps), or until `request_stop()`.

        Args:
            callbacks: each is called as callback(engine, metrics) after every step; on a GPU
                reading numbers of metrics that are not `ready` holds the loop up.
            until: global step at which to return.
        """
        end = self.config.engine.max_steps if until is None else until
        self._stop = False
        while self.global_step < end and not self._stop:
            metrics = self.step()
            for callback in callbacks:
                callback(self, metrics)
        if self._stop or self.global_step >= self.config.engine.max_steps:
            self._settle(0)  # at the end of a turn the GPU may go on

    def request_stop(self) -> None:
        """Makes `run` return after the step in hand; safe to call from a callback."""
        self._stop = True

    # ---- what the result is read through --------------------------------------------------

    @torch.no_grad()
    def render(self, camera: Camera, shading: str = "albedo") -> RenderOutput:
        """Images of `camera`'s views as the field stands, on the engine's device; no jitter, no
        gradient."""
        return self.renderer.render(
            self.field,
            self.background,
            self.occupancy,
            camera_to(camera, self.device),
            self.global_step,
            shading,
        )

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
        return self.snapshot().tensors()

    def snapshot(self) -> Snapshot:
        """`state_tensors()` as of now, on its way to the host; the loop need not wait for it."""
        state = {f"field.{k}": v for k, v in self.field.state_dict().items()}
        state.update({f"background.{k}": v for k, v in self.background.state_dict().items()})
        state.update({f"optimizer.{k}": v for k, v in self.optimizer.state_dict().items()})
        state.update({f"occupancy.{k}": v for k, v in self.occupancy.state_dict().items()})
        state["engine.generator"] = self.generator.get_state()
        own_stream = self.noise is not self.generator
        state["engine.noise"] = (
            self.noise.get_state() if own_stream else torch.zeros(0, dtype=torch.uint8)
        )
        state["engine.bad_steps"] = self.buffers.bad_steps
        state["engine.global_step"] = torch.tensor(self.global_step)
        rows = [*self._history, *self._pending]

        def finish() -> dict[str, Tensor]:
            numbers = [
                [float(r[n] if isinstance(r, dict) else getattr(r, n)) for n in HISTORY_COLUMNS]
                for r in rows
            ]
            history = torch.tensor(numbers, dtype=torch.float64)
            return {"engine.history": history.reshape(-1, len(HISTORY_COLUMNS))}

        return Snapshot(state, finish)

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over a state of `state_tensors()`.

        Raises:
            SDIFastError: for a missing or superfluous tensor or a shape of another config; the
                engine is unchanged then.
        """
        own = self.state_tensors()
        noise = tensors.get("engine.noise", own["engine.noise"])
        if noise.shape != own["engine.noise"].shape:
            there = "a GPU" if noise.numel() else "a CPU"
            raise SDIFastError(
                f"checkpoint: its noise was drawn on {there}; a run on {self.device} "
                "cannot go on with it"
            )
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
        if noise.numel():
            self.noise.set_state(noise)
        self.global_step = int(tensors["engine.global_step"])
        self._bad_steps = int(tensors["engine.bad_steps"])
        self.buffers.bad_steps.fill_(self._bad_steps)
        self._pending.clear()
        rows = tensors["engine.history"].tolist()
        self._history = [dict(zip(HISTORY_COLUMNS, row, strict=True)) for row in rows]
