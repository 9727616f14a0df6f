"""The whole target of SDI from fixed buffers, as one CUDA graph a number of steps.

Inversion and prediction (methods.md C5 to C7) of B samples, each with its own t, delta, text and
Perp-Neg weights. All of these are data in fixed buffers, so that a graph serves every prompt, view
and time step of its shapes; only the number of steps is built into it. A sample whose path is
shorter stays where it is. Off the GPU the same code runs without a capture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import GuidanceConfig
from ..ops.guided_step import guided_step
from ..reference.philox import philox_normal
from ..types import SDIFastError, StepSpec
from .guide import cfg_convention
from .invert import DiffusionModel, inversion_paths
from .modules import capturing
from .prompt import Condition
from .shortcuts import ConditionedUNet, PlannedUNet, check_shortcuts, plan_calls, steps_ahead

N_WARM_UP = 2  # calls before the first capture: libraries allocate and choose then


@dataclass(frozen=True)
class InvertedTarget:
    """One target and what it came from, each [B, C, h, w]."""

    target: Tensor
    kappa: Tensor  # the noise that takes z to latents_inverted (paper: with H(t) added)
    latents_inverted: Tensor
    noise_pred: Tensor  # the guided eps of the prediction
    n_unet_calls: int


class InversionGraphs:
    """SDI's target for one batch size, number of conditions and shape.

    Args:
        model: a schedule and a denoiser; on a GPU its calls must be capturable.
        config: `variant`, guidance scales, eta, number of steps, shortcuts; fixed for this object.
        latents: of the shape, dtype and device to serve; the numbers do not matter.
        condition: likewise.
        capture: None: where `latents` are on a GPU.
        max_graphs: the graph that was not used for longest goes when there are more; None: one for
            each number of steps that the grid allows, and one to spare.
        seed: of the noise stream; see `rng_state`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        config: GuidanceConfig,
        latents: Tensor,  # [B, C, h, w] f32
        condition: Condition,
        *,
        capture: bool | None = None,
        max_graphs: int | None = None,
        seed: int = 0,
    ) -> None:
        if latents.shape[0] != condition.batch_size:
            raise SDIFastError(
                f"condition: expected {latents.shape[0]} samples, got {condition.batch_size}"
            )
        self.schedule, self.config = model.schedule, config
        self.capture = latents.is_cuda if capture is None else capture
        self.max_graphs = config.inversion_n_steps + 2 if max_graphs is None else max_graphs
        self.shortcuts = config.shortcuts
        check_shortcuts(model.denoiser, self.shortcuts, static=True)
        self._unet = ConditionedUNet(model.denoiser)
        paper = cfg_convention(config) == "paper"
        v = self.schedule.prediction_type == "v_prediction"
        self._up = StepSpec(config.inversion_guidance_scale, paper, v, config.inversion_eta)
        self._down = StepSpec(config.guidance_scale, paper, v)

        batch, device = latents.shape[0], latents.device
        rows = config.inversion_n_steps + 2  # the clean end, the grid, the final level
        self._integers = torch.zeros(2 + rows, batch, dtype=torch.int64, device=device)
        self._lengths, self._t, self._nodes = (
            self._integers[0],
            self._integers[1],
            self._integers[2:],
        )
        self._z = torch.zeros_like(latents, memory_format=torch.contiguous_format)
        self._embeddings = torch.zeros_like(
            condition.embeddings, memory_format=torch.contiguous_format
        )
        weights = condition.neg_weights
        self._weights = None if weights is None else torch.zeros_like(weights, device=device)
        self._noise: Tensor | None = None  # made where noise is given
        self._rng = torch.tensor([seed, 0], device=device)
        self._out = latents.new_zeros(4, *latents.shape)
        self._graphs: OrderedDict[tuple[int, bool], torch.cuda.CUDAGraph] = OrderedDict()
        self._pool: Any = None  # of the graphs, made with the first of them
        if self.capture:
            self._stream = torch.cuda.Stream(device)  # of warm-up and captures alike
        self._warm: set[bool] = set()  # kinds of noise (given or drawn) that have run
        self._last = (1, False)

    def fits(self, latents: Tensor, condition: Condition) -> bool:
        """Whether these have the shapes, dtypes and devices that the buffers were made for."""

        def like(a: Tensor | None, b: Tensor | None) -> bool:
            if a is None or b is None:
                return a is b
            return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)

        return (
            like(latents, self._z)
            and like(condition.embeddings, self._embeddings)
            and like(condition.neg_weights, self._weights)
        )

    @property
    def n_graphs(self) -> int:
        return len(self._graphs)

    @property
    def rng_state(self) -> Tensor:
        """[2] i64 on the CPU, seed and offset: all that a run has to keep. Waits for the GPU."""
        return self._rng.cpu().clone()

    @rng_state.setter
    def rng_state(self, state: Tensor) -> None:
        if state.shape != (2,) or state.dtype != torch.int64:
            raise SDIFastError(f"rng_state: expected [2] int64, got {state.dtype} {state.shape}")
        self._rng.copy_(state)

    def reseed(self, generator: torch.Generator) -> None:
        """Begins a new noise stream with a seed from `generator`, without waiting for a device."""
        seed = torch.randint(
            2**63 - 1, (1,), generator=generator, device=generator.device, dtype=torch.int64
        )
        self._rng[:1].copy_(seed, non_blocking=True)
        self._rng[1:].zero_()

    @torch.no_grad()
    def target(
        self,
        latents: Tensor,  # [B, C, h, w], z
        condition: Condition,
        t: Sequence[int],
        delta: Sequence[int],
        *,
        eta_noise: Tensor | None = None,  # as in ddim_invert; else from the stream
    ) -> InvertedTarget:
        """The target of z at level t, on the caller's stream; a fresh tensor every time.

        Raises:
            SDIFastError: for other shapes than this was made for, or a t without a path.
        """
        if not self.fits(latents, condition):
            raise SDIFastError(
                "latents, condition: expected the shapes, dtypes and devices that the buffers "
                f"have, {tuple(self._z.shape)} and {tuple(self._embeddings.shape)}, got "
                f"{tuple(latents.shape)} and {tuple(condition.embeddings.shape)}"
            )
        nodes, lengths = inversion_paths(self.schedule, t, delta, self.config)
        n_steps = max(lengths)
        numbers = torch.tensor([lengths, list(t), *map(list, zip(*nodes, strict=True))])
        if self._z.is_cuda:
            numbers = numbers.pin_memory()  # from other memory a copy may wait for the device
        self._integers[: len(numbers)].copy_(numbers, non_blocking=True)
        self._z.copy_(latents)
        self._embeddings.copy_(condition.embeddings)
        if self._weights is not None and condition.neg_weights is not None:
            self._weights.copy_(condition.neg_weights)
        given = eta_noise is not None and self.config.inversion_eta != 0.0
        if given:
            assert eta_noise is not None
            self._take_noise(eta_noise, n_steps)
        self._last = (n_steps, given)
        self._run(self._last)
        target, kappa, inverted, eps = self._out.clone().unbind(0)
        return InvertedTarget(target, kappa, inverted, eps, n_steps + 1)

    def _take_noise(self, noise: Tensor, n_steps: int) -> None:
        n = 1 if self.config.variant == "paper" else n_steps
        if tuple(noise.shape) != (n, *self._z.shape):
            raise SDIFastError(
                f"eta_noise: expected shape {(n, *self._z.shape)}, got {tuple(noise.shape)}"
            )
        if self._noise is None:
            self._noise = self._z.new_zeros(len(self._nodes) - 1, *self._z.shape)
        self._noise[:n].copy_(noise)

    # ---- one computation, captured or not -------------------------------------------------------

    def _compute(self, n_steps: int, given: bool) -> None:
        """Buffers to `_out`: target, kappa, inverted latents, eps."""
        eta, paper = self.config.inversion_eta, self.config.variant == "paper"
        levels, weights, z, t = self.schedule.levels, self._weights, self._z, self._t
        k = self._embeddings.shape[0]
        noisy = eta != 0.0
        *calls, last = plan_calls(n_steps, k, self.shortcuts)
        unet = PlannedUNet(self._unet, Condition(self._embeddings, weights), self.shortcuts)
        even = self.shortcuts.even_steps > 0
        grid_stride = self.schedule.n_train_steps / self.config.inversion_n_steps
        x = z
        for step, call in enumerate(calls):
            now, then = self._nodes[step], self._nodes[step + 1]
            noise = self._noise[step] if given and not paper and self._noise is not None else None
            ahead = steps_ahead(then - now, grid_stride) if even else None
            x, _ = guided_step(
                unet.predict(x, now, call, ahead), x, levels, now, then, weights, self._up,
                lengths=self._lengths, step=step, noise=noise,
                rng=self._rng if noisy and not paper and not given else None, draw=step,
            )  # fmt: skip
        inverted, level = x, self._nodes[n_steps]
        kappa = self.schedule.eps_from_x0(x, z, level)
        if paper:
            if noisy:
                kappa = kappa + self._paper_noise(level, given)
            x = self.schedule.add_noise(z, kappa, t)
        outputs = unet.predict(x, t, last)
        target, eps = guided_step(outputs, x, levels, t, None, weights, self._down)
        torch.stack([target, kappa, inverted, eps], out=self._out)
        if noisy and not given:
            self._rng[1:].add_(1 if paper else n_steps)

    def _paper_noise(self, level: Tensor, given: bool) -> Tensor:
        """H(t) of B11, once and on kappa (methods.md G3)."""
        if given and self._noise is not None:
            noise = self._noise[0]
        else:
            flat = philox_normal(self._rng, 0, len(self._z), self._z[0].numel())
            noise = flat.view(self._z.shape).to(self._z.dtype)
        _, spread = self.schedule.roots(level, self._z)
        return self.config.inversion_eta * spread * noise

    # ---- graphs ---------------------------------------------------------------------------------

    def _run(self, key: tuple[int, bool]) -> None:
        if not self.capture:
            self._compute(*key)
            return
        if key not in self._graphs:
            if len(self._graphs) >= self.max_graphs:
                self._graphs.popitem(last=False)
            if not self._graphs:
                self._pool = torch.cuda.graph_pool_handle()  # a pool ends with its last graph
            self._graphs[key] = self._captured(key)
        self._graphs.move_to_end(key)
        self._graphs[key].replay()

    def _captured(self, key: tuple[int, bool]) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self._z.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._warm_up(key[1])
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self._pool, self._stream):
                self._compute(*key)
        return graph

    def _warm_up(self, given: bool) -> None:
        """Runs all kernels once; the noise stream stays where it is."""
        if given in self._warm:
            return
        state = self._rng.clone()
        condition = Condition(self._embeddings, self._weights)
        unet, k = PlannedUNet(self._unet, condition, self.shortcuts), condition.n_conditions
        longest = len(self._nodes) - 1
        kinds = [frozenset(plan_calls(n, k, self.shortcuts)) for n in range(1, longest + 1)]
        for n in {call.n_conditions for call in kinds[-1]}:
            unet.warm_up(self._z, self._t, n)
        for _ in range(N_WARM_UP):
            self._compute(1 + kinds.index(kinds[-1]), given)  # few steps with calls of every kind
        self._rng.copy_(state)
        self._warm.add(given)

    @torch.no_grad()
    def check(self, tolerance: float = 1e-3) -> float:
        """Relative L2 distance of a replay from the same computation outside of the graph.

        Of the last target's buffers and with the noise that comes next, which is left unused. The
        result is wiped first: a graph can leave out without a word what was not on its stream.

        Raises:
            RuntimeError: above `tolerance`, or where anything is not finite.
        """
        state = self._rng.clone()
        results = []
        for run in (lambda: self._run(self._last), lambda: self._compute(*self._last)):
            self._rng.copy_(state)
            self._out.fill_(float("nan"))
            run()
            results.append(self._out.double())
        self._rng.copy_(state)
        replayed, eager = results
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(replayed, eager, strict=True))
        if not worst <= tolerance:
            raise RuntimeError(
                f"inversion graph: a replay differs from the eager result by {worst:.2e}, allowed "
                f"{tolerance:.0e}"
            )
        return worst
