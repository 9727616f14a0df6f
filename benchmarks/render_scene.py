"""The scene of bench_render.py: the official field at its initial blob, seen from an orbit.

Every candidate renders it with the same parameters, occupancy grid, cameras, jitter and step size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import relative_error
from torch import Tensor

from sdi_fast.camera import orbit_cameras
from sdi_fast.config import CameraConfig, FieldConfig, RenderConfig
from sdi_fast.field import EnvironmentBackground, NeRFField
from sdi_fast.occupancy import OccupancyGrid
from sdi_fast.types import Camera, FieldParams, MarchSpec, RaySums

Render = Callable[..., RaySums]  # with sdi_fast.reference.render_views' arguments

OUTPUTS = ("rgb", "opacity", "depth", "normal_sum", "z_variance", "orient")
PARAMETERS = ("table", "density_w1", "density_w2", "color_w1", "color_w2")
STEP = 10_000  # all levels are active
FOVY_DEG = 55.0  # the middle of the training cameras' range
COUNT_TOLERANCE = 0.03  # of the samples asked for
# What an f16 renderer may err: a multiple of what rounding the parameters alone to f16 does to the
# twin. The kernels round four times: parameters, features, slopes and cotangents. The floor is four
# of f16's roundings, 2^-11 each, where the parameters' happen to cancel.
ERROR_FACTOR, ERROR_FLOOR = 4.0, 2e-3
KEPT_TOLERANCE = 1e-3  # of the samples: those at the alpha threshold fall on either side


class Scene:
    """A field, its background and occupancy grid, and the cameras that look at it."""

    def __init__(self, device: str, field: FieldConfig, render: RenderConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device, self.field_config, self.render_config = device, field, render
        self.field = NeRFField(field, generator=generator).to(device)
        self.background = EnvironmentBackground(generator=generator).to(device)
        self.occupancy = OccupancyGrid(
            render, radius=field.radius, device=device, backend="reference"
        )
        self.field.backend = "reference"  # once, for the occupancy
        self.occupancy.update(0, lambda x: self.field.density(x, STEP), render, generator)
        self.field.backend = "auto"
        self.alpha_bound = self.occupancy.mean_tensor()
        self.marching = MarchSpec(
            render.step_size(field.radius),
            render.near,
            render.early_stop_eps,
            render.alpha_threshold,
        )
        self.look(2.0, 1, 8)

    def look(self, distance: float, views: int, size: int) -> None:
        """Sets the cameras, [-> views x size x size], and draws jitter and cotangents for them."""
        self.camera: Camera = orbit_cameras(
            CameraConfig(),
            views,
            height=size,
            width=size,
            distance=distance,
            fovy_deg=FOVY_DEG,
            device=self.device,
        )
        n_rays = views * size * size
        generator = torch.Generator().manual_seed(1)
        jitter = torch.rand(n_rays, generator=generator) * self.marching.step_size
        self.jitter = jitter.to(self.device)
        self.cotangents = {
            name: torch.randn(
                n_rays, *([3] if name in ("rgb", "normal_sum") else []), generator=generator
            ).to(self.device)
            for name in OUTPUTS
        }

    def render(self, render: Render, shading: str, params: FieldParams | None = None) -> RaySums:
        return render(
            self.camera,
            self.field.params() if params is None else params,
            self.field.spec,
            self.field.active_levels(STEP),
            self.occupancy.binary,
            self.marching,
            shading,
            alpha_bound=self.alpha_bound,
            jitter=self.jitter,
        )

    def gradients(
        self, render: Render, shading: str, params: FieldParams | None = None
    ) -> tuple[RaySums, tuple[Tensor, ...]]:
        """The sums, and the parameters' gradients of all six times the fixed cotangents."""
        params = self.field.params() if params is None else params
        sums = self.render(render, shading, params)
        outputs = [getattr(sums, name) for name in OUTPUTS]
        grads = torch.autograd.grad(
            outputs,
            params.tensors(),
            [self.cotangents[name] for name in OUTPUTS],
            allow_unused=True,
        )  # unused: only where no sample is left
        return sums, tuple(
            torch.zeros_like(p) if g is None else g
            for p, g in zip(params.tensors(), grads, strict=True)
        )

    def count(self, render: Render) -> int:
        """Samples kept."""
        with torch.no_grad():
            return int(self.render(render, "albedo").counts[0])

    def find_distance(self, render: Render, size: int, samples: int) -> float:
        """The distance at which one view keeps `samples` within COUNT_TOLERANCE; looks from there.

        Samples fall with the square of the distance, while the whole blob is in view.
        """
        distance, best = 1.75, (math.inf, 0.0)
        for _ in range(12):
            self.look(distance, 1, size)
            ratio = self.count(render) / samples
            best = min(best, (abs(ratio - 1.0), distance))
            if best[0] < COUNT_TOLERANCE / 4:
                break
            distance = min(max(distance * math.sqrt(ratio), 0.75), 8.0)
        if best[0] > COUNT_TOLERANCE:
            raise ValueError(f"samples: expected a number that a view can keep, got {samples}")
        self.look(best[1], 1, size)
        return best[1]


def rounded_to_half(params: FieldParams) -> FieldParams:
    """The parameters after a rounding to f16 and back."""
    return FieldParams(*(p.detach().half().float().requires_grad_() for p in params.tensors()))


@dataclasses.dataclass(frozen=True)
class Truth:
    """The twin's numbers on the host, and what a candidate may differ by."""

    tensors: dict[str, Tensor]
    allowed: dict[str, float]
    counts: tuple[int, int]  # samples kept, tried

    @staticmethod
    def of(scene: Scene, twin: Render, shading: str, factor: float = ERROR_FACTOR) -> Truth:
        tensors, counts = _named(*scene.gradients(twin, shading))
        rounded, _ = _named(*scene.gradients(twin, shading, rounded_to_half(scene.field.params())))
        allowed = {
            name: factor * relative_error(rounded[name], value) + ERROR_FLOOR
            for name, value in tensors.items()
        }
        return Truth(tensors, allowed, counts)

    def check(self, scene: Scene, render: Render, shading: str) -> dict[str, Any]:
        """The candidate's errors beside what they may be; "failed" names those above it."""
        tensors, counts = _named(*scene.gradients(render, shading))
        errors = {name: relative_error(tensors[name], v) for name, v in self.tensors.items()}
        failed = [name for name, error in errors.items() if not error <= self.allowed[name]]
        if abs(counts[0] - self.counts[0]) > KEPT_TOLERANCE * self.counts[0]:
            failed.append("counts")
        return {"errors": errors, "allowed": self.allowed, "counts": counts, "failed": failed}


def _named(sums: RaySums, grads: Sequence[Tensor]) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Outputs and gradients by name, on the host; samples kept and tried."""
    named = {name: getattr(sums, name).detach().cpu() for name in OUTPUTS}
    named |= {f"grad {n}": g.cpu() for n, g in zip(PARAMETERS, grads, strict=True)}
    kept, tried = (int(n) for n in sums.counts)
    return named, (kept, tried)
