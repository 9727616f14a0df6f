"""The CUDA kernels of field, encoding, shading and compositing against their twins on the CPU.

The twins run in f64 or f32 on CPU tensors; random cotangents go through both. Marching and pruning:
test_ops_cuda_samples.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import random_field
from ops_cases import (
    COUNTS,
    F64,
    F64_TOLERANCE,
    SPECS,
    SUMS,
    as_tuple,
    assert_single_precision_rule,
    composite_inputs,
    cotangents,
    field_inputs,
    rand,
    randn,
    shade_inputs,
    worst_error,
)
from torch import Tensor

from sdi_fast.ops import _native
from sdi_fast.ops.composite import composite
from sdi_fast.ops.field import density, field
from sdi_fast.ops.hash_encode import hash_encode
from sdi_fast.ops.shade import shade
from sdi_fast.types import FieldParams, FieldSpec, HashGridSpec, Samples, SDIFastError

pytestmark = pytest.mark.gpu

OFFICIAL = SPECS["official_shape"]
# as many inputs and hidden units as there may be: the fewest samples a tile
WIDEST = FieldSpec(HashGridSpec(32, 4, 8, 3, 1.1), hidden=256)


@dataclass(frozen=True)
class Problem:
    """An op with its arguments in place, on the device of its backend."""

    leaves: list[Tensor]  # what gets gradients
    others: list[Tensor]  # further inputs of floats
    run: Callable[[], Tensor | Sequence[Tensor]]

    def results(self, given: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Outputs and the leaves' gradients; `given`: cotangents, by default random."""
        value = self.run()
        outputs = [value] if isinstance(value, Tensor) else list(value)
        pairs = zip(outputs, given or cotangents(outputs), strict=True)
        traced = [(o, g) for o, g in pairs if o.requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(self.leaves)
        if traced:
            values, weights = zip(*traced, strict=True)
            grads = torch.autograd.grad(values, self.leaves, weights, allow_unused=True)
        found = [
            torch.zeros_like(x) if g is None else g for x, g in zip(self.leaves, grads, strict=True)
        ]
        return [*(o.detach() for o in outputs), *found]


Build = Callable[[torch.dtype, str], Problem]  # (dtype, backend)


def _device(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def _there(backend: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().to(_device(backend)).requires_grad_(t.requires_grad) for t in tensors]


def _inputs(spec: FieldSpec, active: int, n: int, dtype: torch.dtype) -> tuple[Tensor, FieldParams]:
    if active > 0:
        return field_inputs(spec, n, active, dtype)
    x = (rand(n, 3, seed=6) * 2 - 1).float() * spec.radius  # no cell to be calm in
    params = random_field(spec, dtype=torch.float32).tensors()
    return x.to(dtype), FieldParams(*(t.to(dtype).requires_grad_() for t in params))


def _field(spec: FieldSpec, active: int, n: int) -> Build:
    def build(dtype: torch.dtype, backend: str) -> Problem:
        x, params = _inputs(spec, active, n, dtype)
        x, *leaves = _there(backend, [x, *params.tensors()])
        return Problem(
            leaves, [x], lambda: field(x, FieldParams(*leaves), spec, active, backend=backend)
        )

    return build


def _density(spec: FieldSpec, active: int, n: int) -> Build:
    def build(dtype: torch.dtype, backend: str) -> Problem:
        x, params = _inputs(spec, active, n, dtype)
        x, *tensors = _there(backend, [x, *params.tensors()])
        return Problem(
            [],
            [x, *(t.detach() for t in tensors)],
            lambda: density(x, FieldParams(*tensors), spec, active, backend=backend),
        )

    return build


def _hash_encode(spec: FieldSpec, active: int, n: int, corners: bool = True) -> Build:
    """corners: the box's first and last corner among the points (indices that wrap)."""

    def build(dtype: torch.dtype, backend: str) -> Problem:
        x, params = _inputs(spec, active, n, F64)
        u = ((x + spec.radius) / (2 * spec.radius)).float()
        if corners and n > 2:
            u[0], u[1] = 0.0, 1.0
        leaves = [u.to(dtype).requires_grad_(), params.table.detach().to(dtype).requires_grad_()]
        u, table = leaves = _there(backend, leaves)
        return Problem(
            leaves, [], lambda: hash_encode(u, table, spec.grid, active, backend=backend)
        )

    return build


def _shade(shading: str, n: int) -> Build:
    def build(dtype: torch.dtype, backend: str) -> Problem:
        leaves, (x, lights, views) = shade_inputs(dtype, max(n, 1))
        albedo, normal = leaves = _there(backend, [t[:n].detach().requires_grad_() for t in leaves])
        x, lights, views = _there(backend, [x[:n], lights, views[:n]])
        return Problem(
            leaves,
            [x, lights],
            lambda: shade(albedo, normal, x, lights, views, shading, backend=backend),
        )

    return build


def _composite(counts: Sequence[int]) -> Build:
    def build(dtype: torch.dtype, backend: str) -> Problem:
        samples, leaves, directions = composite_inputs(dtype, counts)
        leaves = _there(backend, leaves)
        t_starts, t_ends, directions = _there(
            backend, [samples.t_starts, samples.t_ends, directions]
        )
        ray_indices, packed_info = _there(backend, [samples.ray_indices, samples.packed_info])
        there = Samples(ray_indices, t_starts, t_ends, packed_info)

        def run() -> list[Tensor]:
            sums = composite(*leaves, there, directions, backend=backend)
            return [*(getattr(sums, name) for name in SUMS), sums.weights]

        return Problem(leaves, [t_starts, t_ends, directions], run)

    return build


RAGGED = [int(c) for c in rand(301, seed=8) ** 4 * 700]  # of more than one block; many rays short
CASES: dict[str, Build] = {
    **{
        f"{name}-{active}": _field(spec, active, 333)
        for name, spec in SPECS.items()
        for active in (spec.grid.n_levels, spec.grid.n_levels - 1, 1)
    },
    # around a tile's 32 samples, and more tiles than the backward has blocks
    **{f"field-n{n}": _field(OFFICIAL, 6, n) for n in (0, 1, 31, 32, 33, 20_003)},
    "field-widest": _field(WIDEST, 32, 37),
    "field-no-levels": _field(OFFICIAL, 0, 50),
    **{f"density-n{n}": _density(OFFICIAL, 5, n) for n in (0, 1, 33, 5000)},
    "density-widest": _density(WIDEST, 32, 37),
    **{
        f"hash_encode-{name}": _hash_encode(spec, spec.grid.n_levels - 1, 501)
        for name, spec in SPECS.items()
    },
    **{f"hash_encode-n{n}": _hash_encode(OFFICIAL, 6, n) for n in (0, 1, 20_003)},
    "hash_encode-no-levels": _hash_encode(OFFICIAL, 0, 50),
    **{
        f"shade-{shading}-n{n}": _shade(shading, n)
        for shading in ("albedo", "textureless", "diffuse")
        for n in (0, 1, 200, 1025)
    },
    "composite": _composite(COUNTS),
    "composite-ragged": _composite(RAGGED),
    "composite-one-long-ray": _composite((3000,)),
    "composite-no-samples": _composite((0, 0, 0)),
    "composite-no-rays": _composite(()),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_twin_in_f64(name: str) -> None:
    ours, twin = (CASES[name](F64, backend).results() for backend in ("cuda", "reference"))
    assert all(t.is_cuda for t in ours)
    assert worst_error(ours, twin) < F64_TOLERANCE


@pytest.mark.parametrize("output", range(3), ids=["density", "albedo", "normal"])
def test_each_output_of_the_field_alone(output: int) -> None:
    # one cotangent at a time: no part of the gradient can hide another's error
    results = []
    for backend in ("cuda", "reference"):
        problem = _field(OFFICIAL, 6, 200)(F64, backend)
        alone = replace(problem, run=lambda p=problem: p.run()[output])
        results.append(alone.results())
    assert worst_error(*results) < F64_TOLERANCE


@pytest.mark.parametrize("output", range(len(SUMS)), ids=SUMS)
def test_each_sum_of_compositing_alone(output: int) -> None:
    results = []
    for backend in ("cuda", "reference"):
        problem = _composite(COUNTS)(F64, backend)
        alone = replace(problem, run=lambda p=problem: p.run()[output])
        results.append(alone.results())
    assert worst_error(*results) < F64_TOLERANCE


SINGLE: dict[str, Build] = {
    "field": _field(OFFICIAL, 6, 2000),
    "density": _density(OFFICIAL, 6, 2000),
    # calm points only: f32's slopes jump at the cells' faces
    "hash_encode": _hash_encode(OFFICIAL, 6, 2000, corners=False),
    **{f"shade-{s}": _shade(s, 200) for s in ("albedo", "textureless", "diffuse")},
    "composite": _composite([int(c) for c in rand(60, seed=8) * 200]),
}


@pytest.mark.parametrize("name", SINGLE)
def test_obeys_single_precision_rule(name: str) -> None:
    assert_single_precision_rule(
        lambda dtype, backend: SINGLE[name](dtype, backend).results(), backend="cuda"
    )


FIXED_SIZE: dict[str, Build] = {
    "field": _field(OFFICIAL, 6, 333),
    "density": _density(OFFICIAL, 6, 333),
    "hash_encode": _hash_encode(OFFICIAL, 6, 333),
    "shade": _shade("diffuse", 333),
    "composite": _composite(COUNTS),
}


@torch.no_grad()
def _scale(problem: Problem, factor: float) -> None:
    for tensor in (*problem.leaves, *problem.others):
        tensor.mul_(factor)


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_takes_the_current_stream(name: str) -> None:
    problem = FIXED_SIZE[name](F64, "cuda")
    given = [g.cuda() for g in cotangents(problem.results()[: -len(problem.leaves) or None])]
    expected = problem.results(given)
    _scale(problem, 0.5)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: whoever does not wait sees the halved inputs
        _scale(problem, 2.0)
        ours = problem.results(given)
    torch.cuda.synchronize()
    # the table's gradient is summed in any order
    assert worst_error(ours, expected) < F64_TOLERANCE


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_a_graph_captures_it(name: str) -> None:
    problem = FIXED_SIZE[name](F64, "cuda")
    given = [g.cuda() for g in cotangents(problem.results()[: -len(problem.leaves) or None])]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warms up, as captures have to
        problem.results(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.results(given)
    _scale(problem, 0.75)
    graph.replay()
    torch.cuda.synchronize()
    expected = problem.results(given)
    assert worst_error(captured, expected) < F64_TOLERANCE
    _scale(problem, 0.5)
    assert worst_error(captured, problem.results(given)) > 1e-3  # the inputs do matter


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_same_bits_twice_but_for_the_table(name: str) -> None:
    problem = FIXED_SIZE[name](torch.float32, "cuda")
    first, second = problem.results(), problem.results()
    for a, b in zip(first, second, strict=True):
        if a.dim() != 1 or a.shape[0] != OFFICIAL.grid.n_params:
            assert torch.equal(a, b)


def test_masked_levels_get_no_gradient() -> None:
    *_, table, density_w1, _, color_w1, _ = _field(OFFICIAL, 3, 333)(F64, "cuda").results()
    first = OFFICIAL.grid.level_offsets[3] * OFFICIAL.grid.n_features
    assert table[:first].abs().sum() > 0 and torch.count_nonzero(table[first:]) == 0
    for grad in (density_w1, color_w1):
        masked = grad[:, 3 * OFFICIAL.grid.n_features :]
        assert grad.abs().sum() > 0 and torch.count_nonzero(masked) == 0


def test_points_outside_the_box_are_safe() -> None:
    params = FieldParams(*(t.cuda() for t in random_field(OFFICIAL).tensors()))
    bad = torch.tensor([[1e30, -1e30, 5.0], [float("nan")] * 3, [float("inf"), 0.0, 0.0]])
    x = torch.cat([bad, torch.full((2, 3), 2.0), torch.full((2, 3), -2.0)]).cuda()
    sigma, albedo, _ = field(x, params, OFFICIAL, 6, backend="cuda")
    assert sigma[1].isnan()  # through the blob
    assert sigma[3:].isfinite().all() and albedo.isfinite().all()


def test_rows_that_leave_the_samples_count_as_empty() -> None:
    samples, leaves, directions = composite_inputs(F64, COUNTS)
    leaves = _there("cuda", leaves)
    bad = {0: (-1, 3), 3: (samples.n_samples - 1, 2), 5: (2**62, 2**62), 6: (0, -2)}
    rows, emptied = samples.packed_info.clone(), samples.packed_info.clone()
    for ray, row in bad.items():
        rows[ray], emptied[ray] = torch.tensor(row), torch.tensor((0, 0))

    def run(packed_info: Tensor) -> list[Tensor]:
        there = Samples(*(t.cuda() for t in as_tuple(replace(samples, packed_info=packed_info))))
        sums = composite(*leaves, there, directions.cuda(), backend="cuda")
        return [*(getattr(sums, name) for name in SUMS), sums.weights]

    ours, expected = (Problem(leaves, [], lambda p=p: run(p)).results() for p in (rows, emptied))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    opacity = ours[1].cpu()
    assert (opacity[list(bad)] == 0).all() and opacity[2] > 0


def test_a_view_without_a_light_shows_as_nan() -> None:
    (albedo, normal), (x, lights, views) = shade_inputs(torch.float32, 8)
    views = views.clone()
    views[2], views[5] = 3, -1
    rgb = shade(*(t.cuda() for t in (albedo, normal, x, lights, views)), "diffuse", backend="cuda")
    assert rgb.isnan().any(dim=-1).tolist() == [i in (2, 5) for i in range(8)]


def test_auto_takes_the_kernels_and_devices_have_to_fit() -> None:
    samples, leaves, directions = composite_inputs(torch.float32)
    there = [t.detach().cuda() for t in leaves]
    assert _native.resolve_backend("op", there[0], "auto", ("cpu", "cuda", "triton")) == "cuda"
    for backend in ("auto", "cuda"):  # a CPU address on the GPU would be a stray read
        with pytest.raises(SDIFastError, match=r"samples\..*: expected device cuda:0, got cpu"):
            composite(*there, samples, directions.cuda(), backend=backend)


# 11 GB of results, whose last elements no 32-bit index reaches
@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    grid = HashGridSpec(10, 4, 8, 3, 1.3)
    n = 2**31 // grid.n_output_dims + 1_000_000
    table = randn(grid.n_params, dtype=torch.float32)
    ends = rand(200, 3, dtype=torch.float32)
    u = torch.zeros(n, 3, device="cuda")
    u[:100], u[-100:] = ends[:100].cuda(), ends[100:].cuda()
    features = hash_encode(u, table.cuda(), grid, 10, backend="cuda")
    ours = torch.cat([features[:100], features[-100:]])
    twin = hash_encode(ends, table, grid, 10, backend="reference")
    assert worst_error([ours], [twin]) < 1e-6  # f32, sums of 8 products
