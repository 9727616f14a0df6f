"""Inputs and comparisons shared by the tests of the C++ ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from conftest import random_field, relative_error
from torch import Tensor

from sdi_fast.reference.hash_encode import hash_encode
from sdi_fast.types import FieldParams, FieldSpec, HashGridSpec, Samples

F64 = torch.float64

# f64 sums of some thousand terms in another order: 1e-16 times a condition number of up to 1e4
F64_TOLERANCE = 1e-12

# shapes that leave odd ends everywhere: features, hidden units, levels, samples
SPECS = {
    "official_shape": FieldSpec(HashGridSpec(6, 2, 9, 4, 1.7), hidden=64),
    "one_feature": FieldSpec(HashGridSpec(5, 1, 8, 3, 1.5), hidden=17),
    "three_features": FieldSpec(HashGridSpec(3, 3, 9, 4, 1.9), hidden=5, radius=1.3),
    "four_features": FieldSpec(HashGridSpec(4, 4, 10, 5, 1.5), hidden=33, blob_std=0.3),
}

COUNTS = (5, 0, 1, 40, 0, 17, 3)  # samples of rays
SUMS = ("rgb", "opacity", "depth", "normal_sum", "z_variance", "orient")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64).to(dtype)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=F64).to(dtype)


def cotangents(outputs: Sequence[Tensor], seed: int = 100) -> list[Tensor]:
    return [
        randn(*o.shape, seed=seed + i, dtype=o.dtype).to(o.device) for i, o in enumerate(outputs)
    ]


def outputs_and_grads(
    function: Callable[[], Tensor | Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """function()'s tensors, and gradients of `inputs` for random cotangents."""
    result = function()
    outputs = [result] if isinstance(result, Tensor) else list(result)
    grads = torch.autograd.grad(outputs, inputs, cotangents(outputs))
    return outputs, list(grads)


def worst_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative L2 error; infinite where one is NaN."""
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    return max(math.inf if math.isnan(e) else e for e in errors)


def assert_single_precision_rule(
    run: Callable[[torch.dtype, str], Sequence[Tensor]],  # (dtype, backend) -> tensors
    backend: str = "cpu",
) -> None:
    """style.md 4: each error in f32 is at most twice the PyTorch twin's, both against f64.

    The floor of 2e-7, two units in the last place, is for outputs that the twin happens to get
    exactly right.
    """
    exact = run(torch.float64, "reference")
    ours, twin = run(torch.float32, backend), run(torch.float32, "reference")
    for i, (e, o, t) in enumerate(zip(exact, ours, twin, strict=True)):
        allowed = 2.0 * relative_error(t, e) + 2e-7
        assert relative_error(o, e) <= allowed, f"tensor {i}"


def calm_points(
    spec: FieldSpec,
    params: FieldParams,
    n: int,
    active_levels: int,
    *,
    margin: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """Points [n, 3] f64 in the box, `margin` away from cell faces and from both ReLUs' kinks.

    They are floats of f32, so that both precisions see the same points.
    """
    found = torch.empty(0, 3, dtype=F64)
    while len(found) < n:
        seed += 1
        u = rand(8 * n + 64, 3, seed=seed).float().double()
        calm = torch.ones(len(u), dtype=torch.bool)
        for scale in spec.grid.scales[:active_levels]:
            share = (u * scale + 0.5).frac()
            calm &= ((share > margin) & (share < 1.0 - margin)).all(dim=-1)
        features = hash_encode(u, params.table.detach().double(), spec.grid, active_levels)
        for w in (params.density_w1, params.color_w1):
            calm &= ((features @ w.detach().double().T).abs() > margin).all(dim=-1)
        found = torch.cat([found, (u[calm] * 2.0 - 1.0) * spec.radius])
    return found[:n].float().double()


def field_inputs(
    spec: FieldSpec, n: int, active_levels: int, dtype: torch.dtype = F64, seed: int = 0
) -> tuple[Tensor, FieldParams]:
    """Points and parameters (leaves with gradients), the same numbers in both precisions."""
    base = random_field(spec, dtype=torch.float32, seed=seed)
    x = calm_points(spec, base, n, active_levels, seed=seed)
    leaves = [t.to(dtype).requires_grad_() for t in base.tensors()]
    return x.to(dtype), FieldParams(*leaves)


def random_samples(
    counts: Sequence[int], *, dtype: torch.dtype = F64, step: float = 0.05, seed: int = 0
) -> Samples:
    """Rays with the given numbers of samples, at increasing distances with gaps."""
    count = torch.tensor(counts, dtype=torch.int64)
    n = int(count.sum())
    ray = torch.repeat_interleave(torch.arange(len(counts)), count)
    first = count.cumsum(0) - count
    place = torch.arange(n) - first[ray]
    t_starts = (0.3 + step * (place + rand(n, seed=seed))).float()  # the same in both precisions
    t_ends = (t_starts + step * 0.5).to(dtype)
    return Samples(ray, t_starts.to(dtype), t_ends, torch.stack([first, count], dim=-1))


def as_tuple(samples: Samples) -> tuple[Any, ...]:
    return (samples.ray_indices, samples.t_starts, samples.t_ends, samples.packed_info)


def rays_at(n: int, dtype: torch.dtype, distance: float = 1.7) -> tuple[Tensor, Tensor]:
    """Origins and directions [n, 3] of rays from that distance, more or less to the centre."""
    origins = F.normalize(randn(n, 3, seed=1), dim=-1) * distance
    directions = F.normalize(randn(n, 3, seed=2) * 0.5 - origins, dim=-1)
    return origins.to(dtype), directions.to(dtype)


def composite_inputs(
    dtype: torch.dtype, counts: Sequence[int] = COUNTS
) -> tuple[Samples, list[Tensor], Tensor]:
    """Samples; density, rgb and normal, leaves with gradients; directions."""
    samples = random_samples(counts, dtype=dtype)
    n, rays = samples.n_samples, len(counts)
    # from thin to opaque, so that both sides of O = 0.5 occur
    density = (rand(n, seed=1).float() ** 3 * 60.0).to(dtype)
    rgb = rand(n, 3, seed=2).float().to(dtype)
    normal = F.normalize(randn(n, 3, seed=3), dim=-1).float().to(dtype)
    directions = F.normalize(randn(rays, 3, seed=4), dim=-1).float().to(dtype)
    return samples, [t.requires_grad_() for t in (density, rgb, normal)], directions


def shade_inputs(dtype: torch.dtype, n: int = 200) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Albedo and normal, leaves with gradients; positions, lights and views."""
    albedo = rand(n, 3, seed=1).float().to(dtype).requires_grad_()
    normal = F.normalize(randn(n, 3, seed=2), dim=-1).float().to(dtype).requires_grad_()
    x = randn(n, 3, seed=3).float().to(dtype)
    lights = (randn(3, 3, seed=4) * 2).float().to(dtype)
    views = torch.arange(n) * 3 // n
    return [albedo, normal], (x, lights, views)
