"""From a field and cameras to images (methods.md D: marching, shading, compositing)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import FieldConfig, RenderConfig
from .constants import NORMALIZE_EPS
from .ops._native import has_cuda
from .ops.background import background as background_op
from .ops.composite import composite
from .ops.field import density as density_op
from .ops.field import field as field_op
from .ops.march import march
from .ops.prune import prune
from .ops.rays import generate_rays
from .ops.render_views import can_fuse, render_views
from .ops.shade import shade
from .types import (
    Camera,
    Composited,
    FieldParams,
    FieldSpec,
    MarchSpec,
    Rays,
    RaySums,
    RenderOutput,
    Samples,
    SDIFastError,
)

# Samples evaluated at once where no gradient is wanted: bounds the memory of the PyTorch twin.
CHUNK_SAMPLES = 1 << 18


class Field(Protocol):
    """What the renderer needs of a field (see sdi_fast.field.NeRFField)."""

    spec: FieldSpec

    def params(self) -> FieldParams: ...
    def active_levels(self, step: int) -> int: ...


class Background(Protocol):
    """What the renderer needs of a background (see sdi_fast.field.EnvironmentBackground)."""

    @property
    def w1(self) -> Tensor: ...
    @property
    def w2(self) -> Tensor: ...
    @property
    def w3(self) -> Tensor: ...


class Occupancy(Protocol):
    """What the renderer needs of a grid (see sdi_fast.occupancy.OccupancyGrid)."""

    binary: Tensor  # [G, G, G] bool

    def mean(self) -> float: ...
    def mean_tensor(self) -> Tensor: ...


class Renderer:
    """Renders batches of views; differentiable in the field's and the background's parameters.

    Args:
        backend: of the ops, see `sdi_fast.ops`.
        deterministic: gradients that repeat bit by bit; see `ops.render_views`.
    """

    def __init__(
        self,
        field_config: FieldConfig,
        render_config: RenderConfig,
        backend: str = "auto",
        deterministic: bool = False,
    ) -> None:
        if render_config.n_samples_per_ray < 1:
            raise SDIFastError(
                "render.n_samples_per_ray: expected at least 1, "
                f"got {render_config.n_samples_per_ray}"
            )
        if render_config.precision not in ("auto", "fp16", "fp32"):
            raise SDIFastError(
                'render.precision: expected "auto", "fp16" or "fp32", '
                f"got {render_config.precision!r}"
            )
        self.config = render_config
        self.radius = field_config.radius
        self.step_size = render_config.step_size(field_config.radius)
        self.backend = backend
        self.deterministic = deterministic

    def render(
        self,
        field: Field,
        background: Background,
        occupancy: Occupancy,
        camera: Camera,
        step: int,
        shading: str,  # "albedo", "textureless" or "diffuse"
        *,
        jitter: Tensor | None = None,  # [R] scene units, in [0, step_size)
    ) -> RenderOutput:
        """Images of `camera`'s views at training step `step` (which sets the active levels).

        Args:
            jitter: how far each ray's samples are shifted (see `draw_jitter`); None: not at all,
                for evaluation.

        Raises:
            SDIFastError: for an unknown shading or tensors that do not fit each other.
        """
        rays = self._rays(camera)
        active = field.active_levels(step)
        sums: RaySums | Composited
        n_samples: int | Tensor
        if self.is_fused(field, camera.c2w):
            sums, n_samples = self._fused(field, occupancy, camera, active, shading, jitter)
        else:
            samples = self._visible_samples(field, occupancy, rays, active, jitter)
            sums = self._composite(field, rays, samples, camera.light_positions, active, shading)
            n_samples = samples.n_samples
        sky = background_op(
            rays.directions, background.w1, background.w2, background.w3, backend=self.backend
        )
        return _images(sums, sky, rays, n_samples)

    def is_fused(self, field: Field, like: Tensor) -> bool:
        """Whether the fused kernels render `field` on `like`'s device, in its dtype.

        Raises:
            SDIFastError: where they are asked for and cannot, or where gradients have to repeat and
                would be added up by atomics.
        """
        can = may_fuse(self.config, self.backend, field.spec, like.device, like.dtype)
        if self.config.precision == "fp16" and not can:
            raise SDIFastError(
                'render.precision: "fp16" needs backend "auto" or "cuda", a CUDA device, an '
                "extension built with nvcc and a field that sdi_fast.ops.render_views takes; "
                f"got backend {self.backend!r}, device {like.device}"
            )
        adds_in_any_order = like.is_cuda and has_cuda() and self.backend in ("auto", "cuda")
        if self.deterministic and not can and adds_in_any_order:
            raise SDIFastError(
                "deterministic: the single CUDA ops add up the table's gradients in any order; "
                'expected render.precision "auto" or "fp16" and a field that '
                'sdi_fast.ops.render_views takes, or backend "reference", got precision '
                f"{self.config.precision!r}, backend {self.backend!r}"
            )
        return can

    def _fused(
        self,
        field: Field,
        occupancy: Occupancy,
        camera: Camera,
        active_levels: int,
        shading: str,
        jitter: Tensor | None,
    ) -> tuple[RaySums, Tensor]:
        """The sums of all rays, and how many samples they hold."""
        config = self.config
        sums = render_views(
            camera,
            field.params(),
            field.spec,
            active_levels,
            occupancy.binary,
            MarchSpec(self.step_size, config.near, config.early_stop_eps, config.alpha_threshold),
            shading,
            alpha_bound=occupancy.mean_tensor(),
            jitter=jitter,
            backend=self.backend,
            deterministic=self.deterministic,
        )
        return sums, sums.counts[0]

    def _rays(self, camera: Camera) -> Rays:
        origins, directions = generate_rays(
            camera.c2w, camera.fovy, camera.height, camera.width, backend=self.backend
        )
        return Rays(origins, directions, camera.batch_size, camera.height, camera.width)

    @torch.no_grad()
    def _visible_samples(
        self,
        field: Field,
        occupancy: Occupancy,
        rays: Rays,
        active_levels: int,
        jitter: Tensor | None,
    ) -> Samples:
        """The samples that contribute, found without gradient."""
        samples = march(
            rays.origins,
            rays.directions,
            occupancy.binary,
            self.radius,
            self.step_size,
            self.config.near,
            jitter,
            backend=self.backend,
        )
        params = field.params()
        density = _in_chunks(
            lambda x: (density_op(x, params, field.spec, active_levels, backend=self.backend),),
            _positions(rays, samples),
        )[0]
        return prune(
            samples,
            density,
            self.config.early_stop_eps,
            min(self.config.alpha_threshold, occupancy.mean()),
            backend=self.backend,
        )

    def draw_jitter(self, n_rays: int, generator: torch.Generator) -> Tensor:
        """One offset [R] in [0, step_size) a ray, on the generator's device."""
        u = torch.rand(n_rays, generator=generator, device=generator.device)
        return u * self.step_size

    def _composite(
        self,
        field: Field,
        rays: Rays,
        samples: Samples,
        lights: Tensor,  # [B, 3] scene units
        active_levels: int,
        shading: str,
    ) -> Composited:
        params = field.params()

        def evaluate(x: Tensor) -> tuple[Tensor, ...]:
            return field_op(x, params, field.spec, active_levels, backend=self.backend)

        x = _positions(rays, samples)
        # With gradient, chunks would save nothing: autograd keeps them all.
        density, albedo, normal = (
            evaluate(x) if torch.is_grad_enabled() else _in_chunks(evaluate, x)
        )
        view = samples.ray_indices // (rays.height * rays.width)
        rgb = shade(albedo, normal, x, lights, view, shading, backend=self.backend)
        return composite(density, rgb, normal, samples, rays.directions, backend=self.backend)


def may_fuse(
    config: RenderConfig,
    backend: str,
    spec: FieldSpec,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Whether a renderer of these settings takes the fused kernels where they can be had."""
    asked = config.precision != "fp32" and backend in ("auto", "cuda")
    return asked and can_fuse(spec, device, dtype)


def choose_shading(step: int, config: RenderConfig, generator: torch.Generator) -> str:
    """The shading of a training step: "albedo" at first, later drawn (methods.md D, Shading)."""
    if config.albedo_prob < 0 or config.textureless_prob < 0:
        raise SDIFastError(
            "render.albedo_prob, render.textureless_prob: expected numbers >= 0, "
            f"got {config.albedo_prob}, {config.textureless_prob}"
        )
    if step < config.ambient_only_steps:
        return "albedo"
    u = float(torch.rand((), generator=generator, device=generator.device))
    if u < config.albedo_prob:
        return "albedo"
    return "textureless" if u < config.albedo_prob + config.textureless_prob else "diffuse"


def _positions(rays: Rays, samples: Samples) -> Tensor:
    """Midpoints of the samples, [N, 3] in scene units."""
    middle = 0.5 * (samples.t_starts + samples.t_ends)
    ray = samples.ray_indices
    return torch.addcmul(rays.origins[ray], rays.directions[ray], middle[:, None])


def _in_chunks(
    function: Callable[[Tensor], tuple[Tensor, ...]],
    x: Tensor,  # [N, 3]
) -> tuple[Tensor, ...]:
    """function(x), a tuple of tensors over N, evaluated CHUNK_SAMPLES points at a time."""
    if x.shape[0] <= CHUNK_SAMPLES:
        return function(x)
    parts = [function(chunk) for chunk in x.split(CHUNK_SAMPLES)]
    return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))


def _images(
    sums: Composited | RaySums,
    sky: Tensor,  # [R, 3] in [0, 1]
    rays: Rays,
    n_samples: int | Tensor,
) -> RenderOutput:
    opacity = sums.opacity[:, None]
    unit_normal = F.normalize(sums.normal_sum, dim=-1, eps=NORMALIZE_EPS)

    def image(values: Tensor) -> Tensor:
        return values.reshape(rays.batch_size, rays.height, rays.width, -1)

    return RenderOutput(
        comp_rgb=image(sums.rgb + (1.0 - opacity) * sky),
        comp_rgb_fg=image(sums.rgb),
        comp_rgb_bg=image(sky),
        opacity=image(opacity),
        depth=image(sums.depth),
        z_variance=image(sums.z_variance),
        comp_normal=image(opacity * (unit_normal + 1.0) / 2.0),
        orient=image(sums.orient),
        n_samples=n_samples,
    )
