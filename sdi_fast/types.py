"""What the stages hand to each other.

World frame: z up, right-handed, azimuth 0 looks from +x. Camera frame: x right, y up, looking
along -z. Lengths are in scene units (the bounding cube is [-radius, radius]^3), angles in the
unit that the name says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from .constants import HASH_ENTRY_ALIGNMENT


class SDIFastError(ValueError):
    """Bad input from the user: one line that names the argument, what was expected, what came."""


@dataclass(frozen=True)
class Camera:
    """A batch of B pinhole cameras with one point light each."""

    c2w: Tensor  # [B, 3, 4] f32, columns right, up, -look, position
    fovy: Tensor  # [B] f32, rad, vertical field of view
    light_positions: Tensor  # [B, 3] f32, scene units
    azimuth_deg: Tensor  # [B] f32, degrees in [-180, 180], unperturbed: what the prompt is told
    elevation_deg: Tensor  # [B] f32, degrees, unperturbed
    distance: Tensor  # [B] f32, scene units, unperturbed
    height: int  # pixels
    width: int  # pixels

    @property
    def batch_size(self) -> int:
        return int(self.c2w.shape[0])


@dataclass(frozen=True)
class Rays:
    """R = B * H * W rays, view-major then row-major."""

    origins: Tensor  # [R, 3] f32, scene units
    directions: Tensor  # [R, 3] f32, unit length
    batch_size: int
    height: int
    width: int

    @property
    def n_rays(self) -> int:
        return int(self.origins.shape[0])


@dataclass(frozen=True)
class Samples:
    """N intervals on R rays, sorted by ray and then by distance (nerfacc's packed layout)."""

    ray_indices: Tensor  # [N] i64
    t_starts: Tensor  # [N] f32, scene units along the ray
    t_ends: Tensor  # [N] f32
    packed_info: Tensor  # [R, 2] i64: first sample, number of samples

    @property
    def n_samples(self) -> int:
        return int(self.ray_indices.shape[0])


@dataclass(frozen=True)
class Composited:
    """Per-ray sums over samples (methods.md D, compositing)."""

    rgb: Tensor  # [R, 3], sum w c, no background
    opacity: Tensor  # [R], sum w, in [0, 1]
    depth: Tensor  # [R], sum w t_mid, scene units, not normalised
    normal_sum: Tensor  # [R, 3], sum w n
    z_variance: Tensor  # [R], scene units^2, 0 where opacity <= 0.5
    orient: Tensor  # [R], sum sg(w) max(0, n . d)^2
    weights: Tensor  # [N], w = T alpha; for inspection, no gradient flows through it


@dataclass(frozen=True)
class MarchSpec:
    """What fixes where a ray is sampled besides the occupancy grid (methods.md D, Marching)."""

    step_size: float  # scene units
    near: float = 0.0  # scene units
    early_stop_eps: float = 1e-4  # transmittance
    alpha_threshold: float = 0.01


@dataclass(frozen=True)
class RaySums:
    """What rendering leaves of each ray: `Composited` without what belongs to samples."""

    rgb: Tensor  # [R, 3], sum w c, no background
    opacity: Tensor  # [R], sum w, in [0, 1]
    depth: Tensor  # [R], sum w t_mid, scene units, not normalised
    normal_sum: Tensor  # [R, 3], sum w n
    z_variance: Tensor  # [R], scene units^2, 0 where opacity <= 0.5
    orient: Tensor  # [R], sum sg(w) max(0, n . d)^2
    counts: Tensor  # [2] i64: samples kept, samples whose density was evaluated


@dataclass(frozen=True)
class RenderOutput:
    """Images of one batch of views."""

    comp_rgb: Tensor  # [B, H, W, 3], in [0, 1]
    comp_rgb_fg: Tensor  # [B, H, W, 3], premultiplied
    comp_rgb_bg: Tensor  # [B, H, W, 3]
    opacity: Tensor  # [B, H, W, 1]
    depth: Tensor  # [B, H, W, 1]
    z_variance: Tensor  # [B, H, W, 1]
    comp_normal: Tensor  # [B, H, W, 3], opacity * (n + 1) / 2, world frame
    orient: Tensor  # [B, H, W, 1], per-ray orientation penalty, not normalised
    n_samples: int | Tensor  # surviving samples; a 0-dim i64 tensor where reading it would wait


@dataclass(frozen=True)
class HashGridSpec:
    """A multiresolution hash grid in tiny-cuda-nn's layout.

    Level l has scale base * growth^l - 1 and ceil(scale) + 1 grid points a side; its entries are
    dense when they fit into the table and hashed otherwise (methods.md D).
    """

    n_levels: int = 16
    n_features: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = 1.447269237440378

    @cached_property
    def scales(self) -> tuple[float, ...]:
        b = self.per_level_scale
        return tuple(self.base_resolution * b**level - 1.0 for level in range(self.n_levels))

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(math.ceil(s) + 1 for s in self.scales)

    @cached_property
    def level_sizes(self) -> tuple[int, ...]:
        """Entries of each level (each entry is n_features numbers)."""
        align, cap = HASH_ENTRY_ALIGNMENT, 1 << self.log2_hashmap_size
        return tuple(min(-(-(r**3) // align) * align, cap) for r in self.resolutions)

    @cached_property
    def level_offsets(self) -> tuple[int, ...]:
        """First entry of each level, and the total at the end: n_levels + 1 numbers."""
        offsets = [0]
        for size in self.level_sizes:
            offsets.append(offsets[-1] + size)
        return tuple(offsets)

    @cached_property
    def level_is_dense(self) -> tuple[bool, ...]:
        return tuple(r**3 <= s for r, s in zip(self.resolutions, self.level_sizes, strict=True))

    @property
    def n_params(self) -> int:
        return self.level_offsets[-1] * self.n_features

    @property
    def n_output_dims(self) -> int:
        return self.n_levels * self.n_features


@dataclass(frozen=True)
class FieldSpec:
    """What fixes the field's function besides its parameters."""

    grid: HashGridSpec = field(default_factory=HashGridSpec)
    radius: float = 2.0  # scene units
    blob_scale: float = 10.0
    blob_std: float = 0.5  # scene units
    hidden: int = 64


@dataclass(frozen=True)
class FieldParams:
    """The field's parameters, as tensors; MLP weights are laid out as torch.nn.Linear's."""

    table: Tensor  # [grid.n_params] f32
    density_w1: Tensor  # [hidden, L * F]
    density_w2: Tensor  # [1, hidden]
    color_w1: Tensor  # [hidden, L * F]
    color_w2: Tensor  # [3, hidden]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table, self.density_w1, self.density_w2, self.color_w1, self.color_w2)


@dataclass(frozen=True)
class StepSpec:
    """How a UNet's raw outputs move a latent (methods.md A, B3, C3, C6)."""

    scale: float  # of the guidance
    paper_convention: bool = True  # methods.md B3; without Perp-Neg only
    v_prediction: bool = False  # what the UNet predicts: v, or the noise
    eta: float = 0.0  # of the entropy noise
