"""The fast UNet captured in CUDA graphs, one a shape.

A replay costs one launch. It reads and writes fixed buffers: `x`, `t`, the text cache, `out`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...types import SDIFastError
from ..modules import capturing
from .model import FastUNet, TextCache

N_WARM_UP = 3  # calls before the capture: compilation, measurements, libraries' workspaces


class CapturedUNet:
    """One captured forward: K conditions of each of B latents.

    Args:
        unet: the fast UNet, on a GPU.
        batch_size: B.
        size: (h, w) of the latents.
        cache: prepared text of K * B rows; update it with `unet.prepare(context, cache)`.
        beside: another one that never replays at the same time: the two then share their memory,
            and `out` of one is overwritten by the other.
    """

    def __init__(
        self,
        unet: FastUNet,
        batch_size: int,
        size: tuple[int, int],
        cache: TextCache,
        *,
        beside: CapturedUNet | None = None,
    ) -> None:
        if unet.device.type != "cuda":
            raise SDIFastError(f"unet: expected one on a GPU to capture, got {unet.device}")
        self.unet, self.cache = unet, cache
        shape = (batch_size, unet.packed.in_channels, *size)
        self.n_replays = 0
        self.graph = torch.cuda.CUDAGraph()
        draws = torch.Generator(unet.device).manual_seed(0)  # the default one is the caller's
        with torch.inference_mode(False), torch.cuda.device(unet.device):
            self.x = torch.randn(shape, device=unet.device, generator=draws)
            self.t = torch.zeros(batch_size, dtype=torch.long, device=unet.device)
            # memory freed on one stream is not reused on another
            self.stream: torch.cuda.Stream = beside.stream if beside else torch.cuda.Stream()
            self.out = self._capture(beside.pool if beside else None)

    @property
    def pool(self) -> Any:
        """For other graphs to share this one's memory."""
        return self.graph.pool()

    def _capture(self, pool: Any) -> Tensor:
        main, side = torch.cuda.current_stream(), self.stream
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(N_WARM_UP):
                self.unet.warm_up(self.x, self.t, self.cache)
        main.wait_stream(side)
        with capturing(self.graph, pool, side):
            return self.unet.predict_prepared(self.x, self.t, self.cache)

    def replay(self) -> Tensor:
        """`out` for what x, t and the cache now hold."""
        self.graph.replay()
        self.n_replays += 1
        return self.out

    def __call__(
        self,
        x: Tensor,  # [B, C, h, w] f32
        t: Tensor,  # [B] i64
    ) -> Tensor:
        """The raw output, [K * B, C, h, w] f32, overwritten by the next call."""
        if x.shape != self.x.shape or t.shape != self.t.shape:
            raise SDIFastError(
                f"x, t: expected shapes {list(self.x.shape)}, {list(self.t.shape)} as captured, "
                f"got {list(x.shape)}, {list(t.shape)}"
            )
        self.x.copy_(x)
        self.t.copy_(t)
        return self.replay()

    @torch.no_grad()
    def check(self, tolerance: float = 1e-3, seed: int = 0) -> float:
        """Relative L2 distance of a replay from the same computation outside of the graph.

        A graph can leave kernels out without a word (launches on another stream, values computed on
        the host), so fresh inputs are used and the output is wiped first. The same kernels run in
        both, whose sums may be ordered differently where they use atomics.

        Raises:
            RuntimeError: above `tolerance`, or where anything is not finite.
        """
        generator = torch.Generator(device=self.x.device).manual_seed(seed)
        self.x.normal_(generator=generator)
        n = self.unet.packed.time_table.shape[0]
        low = -self.unet.packed.n_negative
        self.t.random_(low, n + low, generator=generator)
        self.out.fill_(float("nan"))
        ours = self.replay().double()
        expected = self.unet.predict_prepared(self.x, self.t, self.cache).double()
        error = ((ours - expected).norm() / expected.norm()).item()
        if not error <= tolerance:
            raise RuntimeError(
                f"captured UNet: a replay differs from the eager result by {error:.2e}, allowed "
                f"{tolerance:.0e}"
            )
        return error


class GraphedUNet:
    """A drop-in for Denoiser that captures each shape at its first call and then replays.

    All graphs share their memory. Inside of a capture by the caller, the kernels are launched
    themselves, to become part of that graph; so they are by the calls on prepared text, which are
    for callers that capture more than one call.
    """

    kind = "fast"
    shares_latents = True  # predict takes K conditions of each latent

    def __init__(self, unet: FastUNet) -> None:
        self.unet = unet
        self.graphs: dict[tuple[int, ...], CapturedUNet] = {}
        self.prepare = unet.prepare
        self.predict_prepared = unet.predict_prepared
        self.predict_deep = unet.predict_deep
        self.predict_shallow = unet.predict_shallow
        self.warm_up = unet.warm_up

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def linears(self) -> str:
        return self.unet.linears

    @property
    def n_calls(self) -> int:
        return sum(graph.n_replays for graph in self.graphs.values())

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,  # [B, C, h, w] f32
        t: Tensor,  # [B] i64; may be negative (methods.md G9)
        context: Tensor,  # [K * B, T, D]; row k * B + b is condition k of sample b
    ) -> Tensor:
        """The raw output (eps or v), [K * B, C, h, w] f32; with K = 1 as Denoiser.predict."""
        if torch.cuda.is_current_stream_capturing():
            return self.unet.predict(x, t, context)
        key = (*x.shape, *context.shape)
        captured = self.graphs.get(key)
        if captured is None:
            beside = next(iter(self.graphs.values()), None)
            size = (x.shape[2], x.shape[3])
            cache = self.unet.prepare(context)
            self.unet.check(x, t, cache)
            captured = CapturedUNet(self.unet, x.shape[0], size, cache, beside=beside)
            self.graphs[key] = captured
        self.unet.prepare(context, captured.cache)
        return captured(x, t).clone()
