"""One optimisation step as two halves over fixed buffers, on a GPU as CUDA graphs.

    first   cameras -> images -> latents, losses of the images
    (target of the guidance: latents -> target; it has graphs of its own)
    second  latents, target -> loss -> gradients -> Adam -> a row of numbers

Memory, all of it allocated before the second step of its kind and then kept:

    buffers    numbers of the step [19 B + 6], jitter [R], posterior noise and target [B, C, h, w],
               counters and row: 1.2 MB for one view of 512 x 512
    scene      parameters, two moments each, occupancy: 152 MB for the official field
    graphs     one pool for all: what one half leaves for the other (the encoder's activations, the
               renderer's sums, one bit a kept sample), gradients, scratch. Halves of one step run
               one after the other and nothing of a step is read by the next, so that the graphs of
               all shadings and numbers of levels share it
    guidance   see diffusion/invert_graph.py

A first half is fixed by shading and number of active levels; both halves are captured at the second
step that has them (the first one runs them kernel by kernel, which loads and tunes what they need).
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import CameraConfig, Config
from .constants import MAX_BAD_STEPS
from .diffusion.modules import capturing
from .diffusion.pipeline import Pipeline
from .field import EnvironmentBackground, NeRFField
from .guidance import Guidance, GuidanceOutput
from .losses import WEIGHT_NAMES, render_losses
from .occupancy import OccupancyGrid
from .optim import Adam
from .readback import ROW_HEAD, upload
from .render import Renderer
from .types import Camera

MAX_KINDS = 6  # of captured halves: three shadings at two numbers of levels
CAMERA_FIELDS = {"c2w": (3, 4), "fovy": (), "light_positions": (3,), "azimuth_deg": (),
                 "elevation_deg": (), "distance": ()}  # fmt: skip
ROW_NAMES = (*ROW_HEAD, *WEIGHT_NAMES)


class StepBuffers:
    """What changes from step to step, at fixed addresses on the device."""

    def __init__(
        self, config: CameraConfig, latent_shape: tuple[int, ...], device: torch.device
    ) -> None:
        b = config.batch_size
        self.device = device
        n_of = {name: b * math.prod(shape) for name, shape in CAMERA_FIELDS.items()}
        self._numbers = torch.zeros(sum(n_of.values()) + len(WEIGHT_NAMES), device=device)
        *parts, self.weights = self._numbers.split([*n_of.values(), len(WEIGHT_NAMES)])
        views = {
            name: part.view(b, *CAMERA_FIELDS[name]) for name, part in zip(n_of, parts, strict=True)
        }
        self.camera = Camera(**views, height=config.height, width=config.width)
        self.jitter = torch.zeros(b * config.height * config.width, device=device)
        self.posterior = torch.zeros(latent_shape, device=device)
        self.target = torch.zeros(latent_shape, device=device)
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)  # in a row
        self.row = torch.zeros(len(ROW_NAMES), dtype=torch.float64, device=device)

    def load(self, camera: Camera, weights: Mapping[str, float]) -> None:
        """Takes over a step's views and its losses' weights, without waiting for the device."""
        parts = [getattr(camera, name).reshape(-1).float() for name in CAMERA_FIELDS]
        parts.append(torch.tensor([weights[name] for name in WEIGHT_NAMES]))
        self._numbers.copy_(upload(torch.cat(parts), self.device))


@dataclasses.dataclass(frozen=True)
class FirstHalf:
    """What the first half leaves."""

    latents: Tensor  # [B, C, h, w], with a gradient
    losses: dict[str, Tensor]  # unweighted scalars, by name
    n_samples: Tensor | int


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a run optimises, and with what."""

    field: NeRFField
    background: EnvironmentBackground
    renderer: Renderer
    occupancy: OccupancyGrid
    optimizer: Adam


class StepHalves:
    """Both halves, kernel by kernel.

    Args:
        guidance: whose loss is taken.
        backend: of the ops, see `sdi_fast.ops`.
    """

    def __init__(
        self, config: Config, scene: Scene, pipeline: Pipeline, guidance: Guidance,
        buffers: StepBuffers, backend: str,
    ) -> None:  # fmt: skip
        self.config, self.scene, self.pipeline = config, scene, pipeline
        self.guidance, self.buffers, self.backend = guidance, buffers, backend

    def first(self, step: int, shading: str, *, captured: bool = True) -> FirstHalf:
        """Renders and encodes the buffers' views; `step` sets the active levels.

        Args:
            captured: now or later; else the encoder may run as graphs of its own.
        """
        scene, buffers = self.scene, self.buffers
        output = scene.renderer.render(
            scene.field, scene.background, scene.occupancy, buffers.camera, step, shading,
            jitter=buffers.jitter,
        )  # fmt: skip
        latents = self.pipeline.encoder.encode(
            output.comp_rgb.permute(0, 3, 1, 2),  # [B, 3, H, W]
            sample=self.config.guidance.sample_posterior,
            noise=buffers.posterior,
            graphed=not captured,
        )
        losses = render_losses(output, buffers.camera, self.config.loss, backend=self.backend)
        return FirstHalf(latents, losses, output.n_samples)

    def second(self, first: FirstHalf, guided: GuidanceOutput) -> None:
        """From the buffers' target to new parameters, unless something is not finite; fills the
        row."""
        buffers, optimizer = self.buffers, self.scene.optimizer
        guided = dataclasses.replace(guided, target=buffers.target)
        parts = {"guidance": self.guidance.loss(first.latents, guided), **first.losses}
        values = torch.stack([parts[name] for name in WEIGHT_NAMES])
        loss = (buffers.weights * values).sum()
        gradients = torch.autograd.grad(loss, optimizer.parameters(), allow_unused=True)
        finite = torch.stack(
            [loss.isfinite(), *(g.isfinite().all() for g in gradients if g is not None)]
        ).all()
        # after too many bad steps in a row nothing moves, however late the host comes to know
        skip = ~finite | (buffers.bad_steps >= MAX_BAD_STEPS)
        optimizer.step(gradients, skip=skip)
        buffers.bad_steps.copy_(torch.where(skip, buffers.bad_steps + 1, 0))
        n_samples = torch.as_tensor(first.n_samples, device=buffers.device)
        head = [loss.detach(), n_samples, skip, buffers.bad_steps]
        torch.cat(
            [torch.stack([v.double() for v in head]), values.detach().double()], out=buffers.row
        )


class GraphHome:
    """A stream and a pool of memory for steps' graphs.

    A pool ends with its last graph, and a capture into one that has ended fails: a graph of the
    home's own keeps it while engines come and go.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream), capturing(self._anchor, self.pool):
            self._kept = torch.zeros(1, device=device)


class StepGraphs:
    """The halves as CUDA graphs, one pair for each shading and number of active levels."""

    def __init__(self, halves: StepHalves, home: GraphHome) -> None:
        self.halves = halves
        self.home = home
        self._seen: set[tuple[str, int]] = set()
        self._graphs: OrderedDict[tuple[str, int], _Pair] = OrderedDict()

    @property
    def n_kinds(self) -> int:
        return len(self._graphs)

    def run(self, step: int, shading: str) -> RunningStep:
        """The first half, on the current stream, which has to be the home's; then `finish` it."""
        key = (shading, self.halves.scene.field.active_levels(step))
        if key not in self._seen:
            self._seen.add(key)
            return run_eagerly(self.halves, step, shading, captured=True)
        pair = self._graphs.get(key)
        if pair is not None and pair.second is None:  # its first step was broken off
            del self._graphs[key]
            pair = None
        if pair is None:
            if not self._graphs:
                torch.cuda.empty_cache()  # what running kernel by kernel took
            if len(self._graphs) >= MAX_KINDS:
                self._graphs.popitem(last=False)
            pair = self._graphs[key] = _Pair(self.home.pool, self.halves, step, shading)
        self._graphs.move_to_end(key)
        pair.first.replay()
        return RunningStep(self.halves, None, pair)


class _Pair:
    """Two graphs; the second one is captured when its turn comes for the first time."""

    def __init__(self, pool: Any, halves: StepHalves, step: int, shading: str) -> None:
        self.pool = pool
        self.first = torch.cuda.CUDAGraph()
        with capturing(self.first, pool):
            self.half: FirstHalf | None = halves.first(step, shading)
        self.latents = self.half.latents.detach()
        self.second: torch.cuda.CUDAGraph | None = None

    def finish(self, halves: StepHalves, guided: GuidanceOutput) -> None:
        if self.second is None:
            assert self.half is not None
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self.pool):
                halves.second(self.half, guided)
            self.second, self.half = graph, None  # autograd's tensors give their memory back
        self.second.replay()


@dataclasses.dataclass(frozen=True)
class RunningStep:
    """A step between its halves."""

    halves: StepHalves
    half: FirstHalf | None
    pair: _Pair | None

    @property
    def latents(self) -> Tensor:
        if self.pair is not None:
            return self.pair.latents
        assert self.half is not None
        return self.half.latents.detach()

    def finish(self, guided: GuidanceOutput) -> None:
        """The second half."""
        self.halves.buffers.target.copy_(guided.target)
        if self.pair is not None:
            self.pair.finish(self.halves, guided)
        else:
            assert self.half is not None
            self.halves.second(self.half, guided)


def run_eagerly(
    halves: StepHalves, step: int, shading: str, *, captured: bool = False
) -> RunningStep:
    """The first half kernel by kernel; then call `finish`.

    Args:
        captured: whether a later step of its kind will be.
    """
    return RunningStep(halves, halves.first(step, shading, captured=captured), None)
