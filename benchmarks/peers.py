"""What others would run: nerfacc around PyTorch MLPs and a hash grid in half precision.

`NerfaccPeer.render_views` has the arguments of sdi_fast.ops.render_views and the structure of the
official code (threestudio's NeRF volume renderer): sampling by nerfacc.OccGridEstimator with a
density pass without gradient, then the field with gradient, its normals by autograd with
create_graph, MLPs in f32. The hash grid is tinycudann's where that can be imported, else
`HalfGrid`: its layout and f16 in PyTorch, all levels at once, keeping nothing a sample for the
backward, as tinycudann does.

nerfacc's lattice is the twin's: step k of a ray spans near + jitter + k dt, taken where the middle
is in an occupied cell. It adds dt up where the twin multiplies, so that a middle within about
1e-5 dt of a cell's face can fall on the other side.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdi_fast.constants import (
    HASH_PRIMES,
    NORMALIZE_EPS,
    Z_VARIANCE_MIN_OPACITY,
    Z_VARIANCE_WEIGHT_FLOOR,
)
from sdi_fast.reference.rays import generate_rays
from sdi_fast.reference.shade import shade
from sdi_fast.types import Camera, FieldParams, FieldSpec, HashGridSpec, MarchSpec, RaySums

CHUNK_SAMPLES = 1 << 19  # at once in HalfGrid: about 2 GB with 16 levels


def import_nerfacc() -> tuple[Any, str]:
    """nerfacc with its CUDA code, or None and why not. The first time this compiles it: minutes."""
    if not torch.cuda.is_available():
        return None, "nerfacc needs a CUDA device"
    try:
        nerfacc = importlib.import_module("nerfacc")
        backend = importlib.import_module("nerfacc.cuda._backend")
    except Exception as error:  # ImportError, or whatever compiling raises
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return (nerfacc, "") if backend._C is not None else (None, "nerfacc found no nvcc")


def import_tinycudann() -> tuple[Any, str]:
    """tinycudann, or None and why not."""
    try:
        return importlib.import_module("tinycudann"), ""
    except Exception as error:  # it raises OSError where its extension does not fit the GPU
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


class NerfaccPeer:
    """Renders a FieldSpec's field with all its levels.

    Args:
        nerfacc: the module; a stand-in where none can be had (tests).
        tinycudann: the module, or None for HalfGrid.
    """

    def __init__(
        self, nerfacc: Any, spec: FieldSpec, device: torch.device | str, tinycudann: Any = None
    ) -> None:
        self.nerfacc = nerfacc
        self.spec = spec
        box = [-spec.radius] * 3 + [spec.radius] * 3
        self.box = torch.tensor(box, device=device)
        self.estimator: Any = None
        grid = spec.grid
        self.grid: HalfGrid | TinycudannGrid = (
            HalfGrid(grid, device) if tinycudann is None else TinycudannGrid(tinycudann, grid)
        )

    def render_views(
        self,
        camera: Camera,
        params: FieldParams,
        spec: FieldSpec,
        active_levels: int,
        occupancy: Tensor,  # [G, G, G] bool
        marching: MarchSpec,
        shading: str,
        *,
        alpha_bound: Tensor | None = None,  # []
        jitter: Tensor | None = None,  # [R] scene units
    ) -> RaySums:
        """Per-ray sums as sdi_fast.ops.render_views gives them; counts[1] is the sampler's."""
        if active_levels != spec.grid.n_levels:
            raise ValueError(f"active_levels: expected {spec.grid.n_levels}, got {active_levels}")
        origins, directions = self.rays(camera)
        table = self.grid.prepare(params.table)
        tried = 0

        def sigma(t_starts: Tensor, t_ends: Tensor, ray: Tensor) -> Tensor:
            nonlocal tried
            tried = len(ray)
            x = _middles(origins, directions, ray, t_starts, t_ends)
            return self._density(x, self.encode(x, table), params)

        estimator = self._estimator(occupancy, alpha_bound)
        with torch.no_grad():
            ray, t_starts, t_ends = estimator.sampling(
                origins,
                directions,
                sigma_fn=sigma,
                near_plane=marching.near,
                t_min=None if jitter is None else marching.near + jitter,
                render_step_size=marching.step_size,
                early_stop_eps=marching.early_stop_eps,
                alpha_thre=marching.alpha_threshold,
            )
        x = _middles(origins, directions, ray, t_starts, t_ends)
        density, albedo, normal = self._field(x, table, params)
        view = ray // (camera.height * camera.width)
        rgb = shade(albedo, normal, x.detach(), camera.light_positions, view, shading)
        return self._composite(density, rgb, normal, ray, t_starts, t_ends, directions, tried)

    def rays(self, camera: Camera) -> tuple[Tensor, Tensor]:  # [R, 3] each
        """Origins and directions of all pixels."""
        return generate_rays(camera.c2w, camera.fovy, camera.height, camera.width)

    def _estimator(self, occupancy: Tensor, alpha_bound: Tensor | None) -> Any:
        """nerfacc's grid with these cells; the mean of `occs` bounds its alpha threshold."""
        if self.estimator is None:
            estimator = self.nerfacc.OccGridEstimator(self.box, occupancy.shape[0])
            self.estimator = estimator.to(self.box.device)
        bound = self.box.new_ones(1) if alpha_bound is None else alpha_bound
        self.estimator.binaries, self.estimator.occs = occupancy[None], bound.reshape(1)
        return self.estimator

    def encode(self, x: Tensor, table: Any) -> Tensor:  # [N, 3] scene units -> [N, L * F]
        unit = (x + self.spec.radius) / (2.0 * self.spec.radius)
        return self.grid.encode(unit, table)

    def _density(self, x: Tensor, features: Tensor, params: FieldParams) -> Tensor:  # [N]
        hidden = F.relu(F.linear(features, params.density_w1))
        net = F.linear(hidden, params.density_w2)[:, 0]
        distance = torch.linalg.vector_norm(x, dim=-1)
        return F.softplus(net + self.spec.blob_scale * (1.0 - distance / self.spec.blob_std))

    def _field(self, x: Tensor, table: Any, params: FieldParams) -> tuple[Tensor, ...]:
        """Density [N], albedo [N, 3], normal [N, 3]."""
        with torch.enable_grad():
            x = x.requires_grad_()
            features = self.encode(x, table)
            density = self._density(x, features, params)
            with self.grid.for_positions():
                (gradient,) = torch.autograd.grad(
                    density, x, torch.ones_like(density), create_graph=True
                )
        normal = -F.normalize(gradient, dim=-1, eps=NORMALIZE_EPS)
        hidden = F.relu(F.linear(features, params.color_w1))
        return density, torch.sigmoid(F.linear(hidden, params.color_w2)), normal

    def _composite(
        self,
        density: Tensor,
        rgb: Tensor,
        normal: Tensor,
        ray: Tensor,
        t_starts: Tensor,
        t_ends: Tensor,
        directions: Tensor,
        tried: int,
    ) -> RaySums:
        n_rays = len(directions)
        weights, _, _ = self.nerfacc.render_weight_from_density(
            t_starts, t_ends, density, ray_indices=ray, n_rays=n_rays
        )

        def accumulate(weight: Tensor, values: Tensor | None = None) -> Tensor:
            return self.nerfacc.accumulate_along_rays(weight, values, ray, n_rays)

        t_mid = (0.5 * (t_starts + t_ends))[:, None]
        opacity = accumulate(weights)
        share = weights / opacity.clamp_min(Z_VARIANCE_WEIGHT_FLOOR)[ray, 0]
        spread = accumulate(share, (t_mid - accumulate(share, t_mid)[ray]).square())[:, 0]
        away = (normal * directions[ray]).sum(dim=-1, keepdim=True).clamp_min(0.0)
        return RaySums(
            rgb=accumulate(weights, rgb),
            opacity=opacity[:, 0],
            depth=accumulate(weights, t_mid)[:, 0],
            normal_sum=accumulate(weights, normal),
            z_variance=spread * (opacity[:, 0] > Z_VARIANCE_MIN_OPACITY),
            orient=accumulate(weights.detach(), away.square())[:, 0],
            counts=torch.tensor([len(ray), tried]),
        )


def _middles(
    origins: Tensor, directions: Tensor, ray: Tensor, t_starts: Tensor, t_ends: Tensor
) -> Tensor:
    return origins[ray] + directions[ray] * (0.5 * (t_starts + t_ends))[:, None]


class TinycudannGrid:
    """tinycudann's encoding in f16, given its parameters at each call."""

    def __init__(self, tinycudann: Any, spec: HashGridSpec) -> None:
        config = {
            "otype": "HashGrid",
            "n_levels": spec.n_levels,
            "n_features_per_level": spec.n_features,
            "log2_hashmap_size": spec.log2_hashmap_size,
            "base_resolution": spec.base_resolution,
            "per_level_scale": spec.per_level_scale,
        }
        self.encoding = tinycudann.Encoding(3, config, dtype=torch.float16)

    def prepare(self, table: Tensor) -> Tensor:
        return table

    def encode(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.func.functional_call(self.encoding, {"params": table}, (x,)).float()

    @contextlib.contextmanager
    def for_positions(self) -> Iterator[None]:
        yield


class HalfGrid:
    """A hash grid whose entries, weights and features are f16, in PyTorch.

    Twice differentiable in the table, once in the positions; cotangents and the table's gradient
    are f32. Indices are 32 bits wide, whose products wrap as tiny-cuda-nn's do.
    """

    def __init__(self, spec: HashGridSpec, device: torch.device | str) -> None:
        self.n_features, self.n_dense = spec.n_features, sum(spec.level_is_dense)
        assert all(spec.level_is_dense[: self.n_dense])  # coarse levels first
        strides = [
            [1, r, r * r] if dense else [p - (1 << 32) * (p >= 1 << 31) for p in HASH_PRIMES]
            for r, dense in zip(spec.resolutions, spec.level_is_dense, strict=True)
        ]
        per_level = (-1, 1, 1)
        integer = {"dtype": torch.int32, "device": device}
        self.scales = torch.tensor(spec.scales, device=device).view(per_level)
        self.strides = torch.tensor(strides, **integer)[:, :, None, None]  # [L, 3, 1, 1]
        self.sizes = torch.tensor(spec.level_sizes, **integer).view(per_level)
        self.offsets = torch.tensor(spec.level_offsets[:-1], **integer).view(per_level)
        self.positions_only = False

    def prepare(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The table, which takes the gradient, and its f16 copy, which is read."""
        return table, table.detach().half()

    def encode(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:  # [N, 3] -> [N, L * F] f32
        """Features of positions in [0, 1]^3."""
        return _Encode.apply(x, *table, self)

    @contextlib.contextmanager
    def for_positions(self) -> Iterator[None]:
        """Inside, a backward leaves the table's gradient out: only the positions' is asked for."""
        self.positions_only = True
        try:
            yield
        finally:
            self.positions_only = False

    def corners(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Entries [L * 8 * n] i32 of the corners, and the places [L, 3, n] inside the cells."""
        position = x.T * self.scales + 0.5
        low = position.floor()
        cell = low.int()
        both = torch.stack([cell, cell + 1], dim=2) * self.strides  # [L, 3, 2, n]
        a = both[:, 0, None, None, :]
        b = both[:, 1, None, :, None]
        c = both[:, 2, :, None, None]
        d = self.n_dense
        dense = (a[:d] + b[:d] + c[:d]).flatten(1, 3) % self.sizes[:d]
        hashed = (a[d:] ^ b[d:] ^ c[d:]).flatten(1, 3) & (self.sizes[d:] - 1)  # powers of two
        return (torch.cat([dense, hashed]) + self.offsets).flatten(), position - low

    def weights(self, inside: Tensor) -> Tensor:  # [L, 3, n] -> [L, 8, n]
        return _corner_products(*_sides(inside))

    def slopes(self, inside: Tensor) -> list[Tensor]:  # 3 of [L, 8, n]: of the weights by x
        sides = _sides(inside)
        signs = inside.new_tensor([-1.0, 1.0])[:, None].expand_as(sides[0]) * self.scales
        return [
            _corner_products(*(signs if i == k else sides[i] for i in range(3))) for k in (0, 1, 2)
        ]

    def gather(self, table: Tensor, index: Tensor, n: int) -> Tensor:  # -> [L, 8, n, F] f16
        entries = table.view(-1, self.n_features).index_select(0, index)
        return entries.view(len(self.scales), 8, n, self.n_features)

    def by_level(self, features: Tensor) -> Tensor:  # [n, L * F] -> [L, n, F]
        return features.view(len(features), -1, self.n_features).transpose(0, 1)

    def scatter(self, gradient: Tensor, index: Tensor, weights: Tensor, values: Tensor) -> None:
        """Adds weights [L, 8, n] times values [L, n, F] to the entries of `gradient`."""
        rows = (weights[..., None] * values[:, None]).view(-1, self.n_features)
        gradient.view(-1, self.n_features).index_add_(0, index, rows)


def _sides(inside: Tensor) -> list[Tensor]:
    """(1 - o, o) along x, y, z: three of [L, 2, n]."""
    return list(torch.stack([1.0 - inside, inside], dim=2).unbind(1))


def _corner_products(x: Tensor, y: Tensor, z: Tensor) -> Tensor:  # three of [L, 2, n] -> [L, 8, n]
    return (z[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]).flatten(1, 3)


def _chunks(n: int) -> Iterator[slice]:
    for begin in range(0, n, CHUNK_SAMPLES):
        yield slice(begin, min(begin + CHUNK_SAMPLES, n))


class _Encode(torch.autograd.Function):
    """Features of positions, from the table's f16 copy; the gradient goes to the f32 table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, half: Tensor, grid: HalfGrid) -> Tensor:
        ctx.save_for_backward(x, table, half)
        ctx.grid = grid
        out = x.new_empty(len(x), len(grid.scales) * grid.n_features)
        for chunk in _chunks(len(x)):
            index, inside = grid.corners(x[chunk])
            weights = grid.weights(inside).half()[..., None]
            values = grid.gather(half, index, inside.shape[-1])
            out[chunk] = (weights * values).sum(dim=1).transpose(0, 1).flatten(1).float()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, table, half = ctx.saved_tensors
        grid = ctx.grid
        by_x = (
            _PositionGradient.apply(grad, x, table, half, grid) if ctx.needs_input_grad[0] else None
        )
        if grid.positions_only or not ctx.needs_input_grad[1]:
            return by_x, None, None, None
        by_table = torch.zeros_like(table)
        for chunk in _chunks(len(x)):
            index, inside = grid.corners(x[chunk])
            grid.scatter(by_table, index, grid.weights(inside), grid.by_level(grad[chunk]))
        return by_x, by_table, None, None


class _PositionGradient(torch.autograd.Function):
    """J^T grad, [N, 3]; differentiable in `grad` and the table."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, table: Tensor, half: Tensor, grid: HalfGrid
    ) -> Tensor:
        ctx.save_for_backward(grad, x, table, half)
        ctx.grid = grid
        out = torch.empty_like(x)
        for chunk in _chunks(len(x)):
            index, inside = grid.corners(x[chunk])
            values = grid.gather(half, index, inside.shape[-1])
            along = (values * grid.by_level(grad[chunk])[:, None]).sum(dim=-1)  # [L, 8, n]
            for k, slope in enumerate(grid.slopes(inside)):
                out[chunk, k] = (slope * along).sum(dim=(0, 1))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, table, half = ctx.saved_tensors
        grid = ctx.grid
        by_grad, by_table = torch.empty_like(grad), torch.zeros_like(table)
        for chunk in _chunks(len(x)):
            index, inside = grid.corners(x[chunk])
            values = grid.gather(half, index, inside.shape[-1])
            slopes = grid.slopes(inside)
            weights = sum(s * v for s, v in zip(slopes, grad_out[chunk].unbind(1), strict=True))
            by_grad[chunk] = (weights[..., None] * values).sum(dim=1).transpose(0, 1).flatten(1)
            grid.scatter(by_table, index, weights, grid.by_level(grad[chunk]))
        return by_grad, None, by_table, None, None
