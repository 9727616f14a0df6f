"""The settings of a run: one frozen dataclass a stage, official values as defaults (methods.md).

A schedule is a number, or [start_step, start_value, end_value, end_step] as the official code
writes it (methods.md D, C()); a float end_step counted epochs there and is refused here. Steps are
written for a run of `EngineConfig.max_steps`; `Config.with_steps` rescales all of them together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from .constants import DEFAULT_MODEL_ID, DIAGONAL_FACTOR, REFERENCE_STEPS
from .types import FieldSpec, HashGridSpec, SDIFastError

Schedule = float | tuple[float, ...]
Range = tuple[float, float]
Variant = Literal["threestudio", "paper"]
Component = Literal["diffusers", "fast", "auto"]


@dataclass(frozen=True)
class CameraConfig:
    """Random training cameras and fixed evaluation cameras (methods.md D, Camera and Light)."""

    height: int = 512  # pixels
    width: int = 512
    batch_size: int = 1  # views a step
    elevation_range: Range = (-10.0, 45.0)  # degrees
    azimuth_range: Range = (-180.0, 180.0)  # degrees
    distance_range: Range = (1.5, 2.0)  # scene units
    fovy_range: Range = (40.0, 70.0)  # degrees
    camera_perturb: float = 0.1  # scene units, uniform half width
    center_perturb: float = 0.2  # scene units, standard deviation
    up_perturb: float = 0.02  # standard deviation
    light_distance_range: Range = (0.8, 1.5)  # scene units
    light_position_perturb: float = 1.0  # standard deviation
    eval_elevation: float = 15.0  # degrees
    eval_distance: float = 2.0
    eval_fovy: float = 70.0  # degrees
    n_eval_views: int = 120


@dataclass(frozen=True)
class FieldConfig:
    """Hash grid, MLPs and density blob (methods.md D, Geometry)."""

    n_levels: int = 16
    n_features: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = 1.447269237440378
    start_level: int = 8  # levels active from the first step
    start_step: int = 2000  # the next level starts update_steps after this
    update_steps: int = 500
    radius: float = 2.0  # scene units
    blob_scale: float = 10.0
    blob_std: float = 0.5
    hidden: int = 64

    def spec(self) -> FieldSpec:
        grid = HashGridSpec(
            self.n_levels,
            self.n_features,
            self.log2_hashmap_size,
            self.base_resolution,
            self.per_level_scale,
        )
        return FieldSpec(grid, self.radius, self.blob_scale, self.blob_std, self.hidden)

    def active_levels(self, step: int) -> int:
        """Levels that are not masked at `step` (methods.md D, progressive mask)."""
        grown = max(step - self.start_step, 0) // max(self.update_steps, 1)
        return min(self.start_level + grown, self.n_levels)


@dataclass(frozen=True)
class RenderConfig:
    """Marching, pruning, shading, occupancy (methods.md D, Marching and Shading)."""

    n_samples_per_ray: int = 512  # sets the step size: 1.732 * 2 * radius / n
    randomized: bool = True  # training: each ray's samples are shifted by a part of a step
    near: float = 0.0  # scene units
    early_stop_eps: float = 1e-4  # transmittance below which a ray ends
    alpha_threshold: float = 0.01
    occupancy_resolution: int = 32
    occupancy_decay: float = 0.95
    occupancy_threshold: float = 0.01
    occupancy_every: int = 16  # steps
    occupancy_warmup: int = 256  # steps in which all cells are updated
    ambient_only_steps: int = 1000  # albedo shading only, before this step
    albedo_prob: float = 0.7  # afterwards
    textureless_prob: float = 0.225  # afterwards; diffuse takes the rest
    # "fp16": the fused CUDA renderer; "fp32": one op after another; "auto": the fused one where the
    # device and the field's form allow it
    precision: Literal["auto", "fp16", "fp32"] = "auto"

    def step_size(self, radius: float) -> float:
        """Length of a marching step, scene units: the box's diagonal over the samples of a ray."""
        return DIAGONAL_FACTOR * 2.0 * radius / self.n_samples_per_ray


@dataclass(frozen=True)
class Shortcuts:
    """Approximations of an inversion, for speed (diffusion/shortcuts.py); 0 and 1 are exact."""

    deep_cache: int = 0  # the UNet's deep part runs every so many steps, and is reused between
    reuse_negatives: int = 0  # so do Perp-Neg's negatives; their difference to the positive is kept
    merge_negatives: bool = False  # one negative, of their texts' weighted mean, for the two
    even_steps: int = 0  # so many equal steps at most; 0: the grid's

    @property
    def exact(self) -> bool:
        reuses = max(self.deep_cache, self.reuse_negatives) > 1
        return not (reuses or self.merge_negatives or self.even_steps)


# What `GuidanceConfig.speed` stands for. UNet work of a target with Perp-Neg at t = 980, 615 and
# 250, counted on SD 2.1 (target_work): exact 12, 9, 5 calls; balanced 7.5, 5.3, 3.0; turbo 3.0,
# 2.5, 2.0. What is lost on Stable Diffusion is not measured yet.
SPEEDS: dict[str, Shortcuts] = {
    "exact": Shortcuts(),
    "balanced": Shortcuts(merge_negatives=True, even_steps=9),
    "turbo": Shortcuts(reuse_negatives=1000, merge_negatives=True, even_steps=4),
}


@dataclass(frozen=True)
class GuidanceConfig:
    """Score distillation (methods.md C and E)."""

    method: Literal["sdi", "sds"] = "sdi"
    variant: Variant = "threestudio"
    guidance_scale: float = 7.5
    inversion_guidance_scale: float = -7.5
    inversion_n_steps: int = 10
    inversion_eta: float = 0.3
    t_range: Range = (0.25, 0.98)  # fraction of the schedule's steps
    t_anneal: bool = True
    perp_neg: bool = True
    cfg_convention: Literal["variant", "threestudio", "paper"] = "variant"
    negative_prompt: str = ""
    sample_posterior: bool = True  # encode with a draw from the posterior, not with its mode
    # SDI's target from fixed buffers, on a GPU as CUDA graphs; its noise then comes from a stream
    # of its own, so that a run is another one than without. None: on a GPU, and where needed
    static: bool | None = None
    # "balanced" and "turbo" approximate the inversion (SPEEDS); none sets model.unet_linears
    speed: Literal["exact", "balanced", "turbo"] = "exact"
    deep_cache: int | None = None  # see Shortcuts; None: as `speed` says
    reuse_negatives: int | None = None  # likewise, and so on
    merge_negatives: bool | None = None
    even_steps: int | None = None

    @property
    def shortcuts(self) -> Shortcuts:
        """What `speed` stands for, but for what is set beside it."""
        preset = SPEEDS[self.speed]
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(preset)}
        return dataclasses.replace(preset, **{k: v for k, v in own.items() if v is not None})


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses, each a schedule (methods.md D, Losses)."""

    guidance: Schedule = 1.0
    orient: Schedule = 0.1
    sparsity: Schedule = (0.0, 0.15, 0.0, 3000.0)
    opaque: Schedule = 0.1
    z_variance: Schedule = 1.0
    convex: Schedule = (0.0, 1.0, 0.1, 4000.0)
    convex_frame: Literal["world", "camera"] = "world"  # methods.md G6


@dataclass(frozen=True)
class OptimConfig:
    """Adam (methods.md D, Optimiser)."""

    lr_field: float = 1e-2
    lr_background: float = 1e-3
    betas: Range = (0.9, 0.99)
    eps: float = 1e-15


@dataclass(frozen=True)
class ModelConfig:
    """The frozen diffusion model."""

    id: str = DEFAULT_MODEL_ID  # "toyworld", a diffusers folder, or a hub id
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # auto: f16 on GPU, else f32
    local_files_only: bool = False
    # "diffusers": its module; "fast": ours on packed weights, refused where the model has a feature
    # that it lacks; "auto": ours on a GPU where it can be, else diffusers', which is then said
    denoiser: Component = "auto"
    encoder: Component = "auto"
    # "fp8": the linear layers of the fast UNet's transformer blocks in e4m3, an approximation for
    # GPUs of compute capability 8.9 and later; a CPU computes as if, slowly. Convolutions, half of
    # the work, stay as they are: PyTorch and cuDNN offer none in fp8
    unet_linears: Literal["exact", "fp8"] = "exact"


@dataclass(frozen=True)
class EngineConfig:
    """The loop."""

    max_steps: int = REFERENCE_STEPS
    seed: int = 0
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    backend: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    # the same bits in every run; on a GPU PyTorch renders then where the fused renderer does not
    deterministic: bool = False
    graphs: bool | None = None  # the rest of a step as CUDA graphs; None: with the fused renderer
    checkpoint_every: int = 500  # steps; 0: only at the end and on Ctrl-C
    threads: int = 0  # CPU threads; 0: leave torch's choice


@dataclass(frozen=True)
class ExportConfig:
    """What is written at the end of a run."""

    mesh_resolution: int = 128  # marching-cubes cells a side
    density_threshold: float = 10.0  # 1/scene unit; the surface is this level set
    turntable_frames: int = 60
    turntable_size: int = 256  # pixels
    preview_views: int = 4
    preview_size: int = 256  # pixels
    fps: int = 24


@dataclass(frozen=True)
class Config:
    """Everything that fixes a run, prompt included."""

    prompt: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    camera: CameraConfig = dataclasses.field(default_factory=CameraConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    render: RenderConfig = dataclasses.field(default_factory=RenderConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)

    def with_steps(self, max_steps: int) -> Config:
        """The same run stretched or shrunk to `max_steps`: every step-counted schedule scales.

        methods.md G12: a run whose schedules do not follow its length is mis-annealed. The
        occupancy's cadence stays, since it follows how fast the field changes, not the run.
        """
        if max_steps < 1:
            raise SDIFastError(f"max_steps: expected at least 1, got {max_steps}")
        ratio = max_steps / self.engine.max_steps

        def steps(n: int) -> int:
            return round(n * ratio)

        loss: dict[str, Any] = {
            f.name: scale_schedule(getattr(self.loss, f.name), ratio)
            for f in dataclasses.fields(self.loss)
            if f.name != "convex_frame"
        }
        return dataclasses.replace(
            self,
            field=dataclasses.replace(
                self.field,
                start_step=steps(self.field.start_step),
                update_steps=max(steps(self.field.update_steps), 1),
            ),
            render=dataclasses.replace(
                self.render, ambient_only_steps=steps(self.render.ambient_only_steps)
            ),
            loss=dataclasses.replace(self.loss, **loss),
            engine=dataclasses.replace(self.engine, max_steps=max_steps),
        )


def scale_schedule(schedule: Schedule, ratio: float) -> Schedule:
    """`schedule` with its steps multiplied by `ratio`; values stay."""
    if isinstance(schedule, int | float):
        return schedule
    numbers = _with_start(schedule)
    is_step = [i == 0 or (i >= 3 and i % 2 == 1) for i in range(len(numbers))]
    return tuple(n * ratio if s else n for n, s in zip(numbers, is_step, strict=True))


def _with_start(schedule: tuple[float, ...]) -> tuple[float, ...]:
    """[s0, v0, v1, s1, v2, s2, ...]; three values imply s0 = 0."""
    numbers = (0.0, *schedule) if len(schedule) == 3 else tuple(schedule)
    if len(numbers) < 4 or len(numbers) % 2:
        raise SDIFastError(
            "schedule: expected a number or [start_step, v0, v1, end_step, ...], "
            f"got {len(schedule)} numbers"
        )
    return numbers


def schedule_value(schedule: Schedule, step: int) -> float:
    """The schedule's value at `step`: clamped linear pieces (methods.md D, C())."""
    if isinstance(schedule, int | float):
        return float(schedule)
    numbers = _with_start(schedule)
    start, value = numbers[0], numbers[1]
    for end_value, end in zip(numbers[2::2], numbers[3::2], strict=True):
        if step <= start:
            return float(value)
        if step < end:
            return value + (end_value - value) * (step - start) / (end - start)
        start, value = end, end_value
    return float(value)


def toyworld_config() -> Config:
    """The settings for the bundled model: 64 x 64 images, made for a CPU.

    Its cameras vary less than the official ones, in training and in use alike: with the official
    ranges an object's size and place in the image say little about it, and objects came out far
    too large, too small, or not at all. Guidance is weaker and the inversion noisier for the same
    reason, as we understand it: what prediction and inversion share of the unconditional score
    cancels, so that of the prior on an object's size only what the added noise asks for is left.
    """
    reference = Config(
        model=ModelConfig(id="toyworld"),
        camera=CameraConfig(
            height=64,
            width=64,
            distance_range=(1.65, 1.85),
            fovy_range=(50.0, 60.0),
            camera_perturb=0.05,
            center_perturb=0.05,
        ),
        field=FieldConfig(
            n_levels=8, log2_hashmap_size=15, base_resolution=8, per_level_scale=1.5, start_level=5
        ),
        render=RenderConfig(n_samples_per_ray=192),
        guidance=GuidanceConfig(
            guidance_scale=2.5,
            inversion_guidance_scale=-0.5,
            inversion_eta=0.6,
            inversion_n_steps=5,
        ),
        optim=OptimConfig(lr_field=6e-3),
        export=ExportConfig(mesh_resolution=96, turntable_frames=40, turntable_size=160),
    )
    return reference.with_steps(600)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain containers, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return plain(dataclasses.asdict(config))
