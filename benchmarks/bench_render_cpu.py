"""Rendering on the CPU, forward and backward: the C++ ops against their PyTorch twins.

    python benchmarks/bench_render_cpu.py [--size 128] [--threads 2] [--rounds 10]

The scene is the official field with all its levels (16 of 2, T = 2^19) at its initial blob, whose
occupancy is known; both backends march, prune, evaluate and composite the same samples, and both
results are compared before anything is timed.
"""

from __future__ import annotations

import dataclasses

import torch
import tyro
from harness import check_close, compare, report
from torch import Tensor

from sdi_fast.camera import orbit_cameras
from sdi_fast.config import CameraConfig, FieldConfig, RenderConfig
from sdi_fast.field import EnvironmentBackground, NeRFField
from sdi_fast.occupancy import OccupancyGrid
from sdi_fast.ops import _native
from sdi_fast.ops.adam import adam_step
from sdi_fast.render import Renderer
from sdi_fast.types import Camera, RenderOutput, SDIFastError

OUTPUTS = ("comp_rgb", "opacity", "depth", "z_variance", "comp_normal", "orient")
IMAGE_TOLERANCE = 1e-4  # the golden data's, for images
GRADIENT_TOLERANCE = 1e-3  # the golden data's, for gradients


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    size: int = 128  # pixels a side
    views: int = 1
    threads: int = 2
    rounds: int = 10
    step: int = 10_000  # sets the active levels; 10000: all
    shading: str = "diffuse"


class Scene:
    """One field, seen by one camera, rendered by either backend."""

    def __init__(self, args: Args) -> None:
        generator = torch.Generator().manual_seed(0)
        self.args = args
        self.field = NeRFField(FieldConfig(), generator=generator)
        with torch.no_grad():  # beyond its initial 1e-4, or the gradients of the MLPs are all noise
            self.field.table.normal_(0.0, 0.1, generator=generator)
        self.background = EnvironmentBackground(generator=generator)
        self.occupancy = OccupancyGrid(RenderConfig(), radius=self.field.spec.radius)
        self.occupancy.update(
            0, lambda x: self.field.density(x, args.step), RenderConfig(), generator
        )
        self.camera: Camera = orbit_cameras(
            CameraConfig(), args.views, height=args.size, width=args.size
        )
        self.parameters = [*self.field.parameters(), *self.background.parameters()]
        self.cotangents: dict[str, Tensor] = {}

    def forward(self, backend: str) -> RenderOutput:
        renderer = Renderer(FieldConfig(), RenderConfig(), backend)
        self.background.backend = backend
        return renderer.render(
            self.field,
            self.background,
            self.occupancy,
            self.camera,
            self.args.step,
            self.args.shading,
        )

    def step(self, backend: str) -> tuple[RenderOutput, tuple[Tensor, ...]]:
        """Images, and gradients of the sum of all outputs times fixed random cotangents."""
        output = self.forward(backend)
        total = torch.zeros(())
        for name in OUTPUTS:
            value = getattr(output, name)
            if name not in self.cotangents:
                generator = torch.Generator().manual_seed(len(self.cotangents))
                self.cotangents[name] = torch.randn(value.shape, generator=generator)
            total = total + (value * self.cotangents[name]).sum()
        return output, torch.autograd.grad(total, self.parameters)

    @torch.no_grad()
    def image(self, backend: str) -> RenderOutput:
        return self.forward(backend)


def check(scene: Scene) -> dict[str, float]:
    """The largest relative errors of images and gradients, backend against backend."""
    (ours, our_grads), (twin, twin_grads) = scene.step("cpu"), scene.step("reference")
    images = [check_close(n, getattr(ours, n), getattr(twin, n), IMAGE_TOLERANCE) for n in OUTPUTS]
    grads = [
        check_close(f"gradient {i}", a, b, GRADIENT_TOLERANCE)
        for i, (a, b) in enumerate(zip(our_grads, twin_grads, strict=True))
    ]
    return {
        "samples": ours.n_samples,
        "samples_twin": twin.n_samples,
        "worst_image_error": max(images),
        "worst_gradient_error": max(grads),
    }


def bench_adam(scene: Scene, rounds: int) -> None:
    table = scene.field.table.detach()
    gradient = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))

    def stepper(backend: str) -> tuple[str, object]:
        state = (table.clone(), gradient, torch.zeros_like(table), torch.zeros_like(table))
        return backend, lambda: adam_step(*state, 1, 1e-2, (0.9, 0.99), 1e-15, backend=backend)

    timings = compare([stepper("reference"), stepper("cpu")], rounds=rounds)
    report(f"adam_cpu_threads{torch.get_num_threads()}", timings, {"parameters": table.numel()})


def main(args: Args) -> None:
    if not _native.is_available():
        raise SDIFastError(f"backend: the C++ extension is missing ({_native.reason_missing()})")
    torch.set_num_threads(args.threads)
    scene = Scene(args)
    extra = {"size": args.size, "views": args.views, "step": args.step, **check(scene)}
    name = f"render_cpu_{args.size}_threads{args.threads}"
    backends = ("reference", "cpu")
    full = compare([(b, lambda b=b: scene.step(b)) for b in backends], rounds=args.rounds)
    report(name, full, {"what": "forward + backward", **extra})
    forward = compare([(b, lambda b=b: scene.image(b)) for b in backends], rounds=args.rounds)
    report(f"{name}_forward", forward, {"what": "forward", **extra})
    bench_adam(scene, args.rounds)


if __name__ == "__main__":
    main(tyro.cli(Args))
