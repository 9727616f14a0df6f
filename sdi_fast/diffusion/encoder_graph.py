"""The fast VAE encoder as an autograd function whose two halves are CUDA graphs.

One forward and one backward graph a shape, in one memory pool, over fixed buffers. What the forward
leaves for the backward is overwritten by the next forward; a backward that comes later runs its
forward again first, so that results never depend on the order. Off the GPU the same code runs
without a capture.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from .fast_encoder import FastEncoder, Step
from .modules import capturing, cudnn_benchmark

MAX_SHAPES = 2  # graphs that are kept; each holds its activations
N_WARM_UP = 3  # calls before a capture: compilation and cuDNN's measurements


class EncoderGraph:
    """One shape's forward and backward."""

    def __init__(self, encoder: FastEncoder, like: Tensor, capture: bool) -> None:
        self.encoder = encoder
        self.generation = 0  # forwards so far
        self._tape: list[Step] = []
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        with torch.inference_mode(False):  # buffers born in that mode could not be written later
            self._x = like
            if capture:
                self._x = torch.zeros_like(like, memory_format=torch.contiguous_format)
            self._out = self._grad = self._grad_x = self._x
            if capture:
                with torch.cuda.device(like.device):
                    self._capture()

    def _capture(self) -> None:
        main, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        draws = torch.Generator(self._x.device).manual_seed(0)  # the default one is the caller's
        stream.wait_stream(main)
        with cudnn_benchmark():
            with torch.cuda.stream(stream):
                self._x.uniform_(-1.0, 1.0, generator=draws)
                for _ in range(N_WARM_UP):
                    out, tape = self.encoder.forward(self._x)
                    grad = torch.empty_like(out).normal_(generator=draws)
                    self.encoder.backward(grad, tape)
                    del out, tape
            main.wait_stream(stream)
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            self._grad = grad
            with capturing(forward, stream=stream):
                self._out, self._tape = self.encoder.forward(self._x)
            with capturing(backward, forward.pool(), stream):
                self._grad_x = self.encoder.backward(self._grad, self._tape)
        self._graphs = (forward, backward)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """A fresh [B, 2 C, h, w]."""
        self.generation += 1
        if self._graphs is None:
            out, self._tape = self.encoder.forward(x)
            return out
        self._x.copy_(x)
        self._graphs[0].replay()
        return self._out.clone()

    @torch.no_grad()
    def backward(self, grad: Tensor) -> Tensor:
        """A fresh gradient of the last forward's x."""
        if self._graphs is None:
            return self.encoder.backward(grad, self._tape)
        self._grad.copy_(grad)
        self._graphs[1].replay()
        return self._grad_x.clone()

    @torch.no_grad()
    def check(self, x: Tensor, grad: Tensor, tolerance: float = 1e-3) -> float:
        """Relative L2 distance of both replays from the same computation outside of the graphs.

        The results are wiped first: a graph can leave out what was not on its stream.

        Raises:
            RuntimeError: above `tolerance`, or where anything is not finite.
        """
        self._out.fill_(float("nan"))
        self._grad_x.fill_(float("nan"))
        replayed = self.forward(x), self.backward(grad)
        with cudnn_benchmark():
            out, tape = self.encoder.forward(x)
            eager = out, self.encoder.backward(grad, tape)
        worst = max(
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in zip(replayed, eager, strict=True)
        )
        if not worst <= tolerance:
            raise RuntimeError(
                f"encoder graph: a replay differs from the eager result by {worst:.2e}, allowed "
                f"{tolerance:.0e}"
            )
        return worst


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: EncoderGraph) -> Tensor:
        ctx.save_for_backward(x)
        ctx.graph = graph
        out = graph.forward(x)
        ctx.generation = graph.generation
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        graph: EncoderGraph = ctx.graph
        if graph.generation != ctx.generation:  # another forward has overwritten the activations
            graph.forward(ctx.saved_tensors[0])
            ctx.generation = graph.generation
        return graph.backward(grad), None


class EncoderGraphs:
    """The differentiable encoder: an EncoderGraph a shape, the last few of them.

    Args:
        encoder: the encoder.
        capture: whether to capture graphs; needs a GPU.
    """

    def __init__(self, encoder: FastEncoder, capture: bool) -> None:
        self.encoder = encoder
        self.capture = capture
        self._graphs: OrderedDict[tuple[Any, ...], EncoderGraph] = OrderedDict()

    def graph_of(self, x: Tensor) -> EncoderGraph:
        key = (tuple(x.shape), x.dtype, x.device)
        if key not in self._graphs:
            if len(self._graphs) >= MAX_SHAPES:  # before the new one takes memory of its own
                self._graphs.popitem(last=False)
            self._graphs[key] = EncoderGraph(self.encoder, x.detach(), self.capture)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def __call__(
        self,
        x: Tensor,  # [B, 3, H, W] f32, in [-1, 1]
        graphed: bool = True,
    ) -> Tensor:
        """The posterior's mean and log variance side by side, [B, 2 C, h, w] in x's dtype.

        Args:
            graphed: False: kernel by kernel, for callers that capture this call themselves; what
                it keeps for the backward then goes with the result.
        """
        self.encoder.check(x)
        graph = self.graph_of(x) if graphed else EncoderGraph(self.encoder, x.detach(), False)
        return _Encode.apply(x, graph)
