"""Triton compositing against its twin: on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import compile_in_child
from ops_cases import (
    F64,
    F64_TOLERANCE,
    assert_single_precision_rule,
    cotangents,
    rand,
    randn,
    random_samples,
    worst_error,
)
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from sdi_fast.kernels.composite import composite_bwd, composite_fwd
from sdi_fast.ops.composite import _forward
from sdi_fast.ops.composite import composite as composite_op
from sdi_fast.reference.composite import composite
from sdi_fast.types import Samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUMS = ("rgb", "opacity", "depth", "normal_sum", "z_variance", "orient")
PACKED_INFO = 5  # its place among a launcher's arguments
# Rays of no sample, of one, of more than one block of the kernel; the last program half empty
COUNTS = (5, 0, 1, 300, 0, 17, 8, 3, 9, 40)


def _inputs(
    dtype: torch.dtype = F64, counts: Sequence[int] = COUNTS, densest: float = 60.0
) -> list[Tensor]:
    """composite_fwd's arguments; by default rays on both sides of O = 0.5."""
    samples = random_samples(counts, dtype=dtype)
    n, rays = samples.n_samples, len(counts)
    density = (rand(n, seed=1).float() ** 3 * densest).to(dtype)
    rgb = rand(n, 3, seed=2).float().to(dtype)
    normal = F.normalize(randn(n, 3, seed=3), dim=-1).float().to(dtype)
    directions = F.normalize(randn(rays, 3, seed=4), dim=-1).float().to(dtype)
    given = (density, rgb, normal, samples.t_starts, samples.t_ends, samples.packed_info)
    return [t.to(DEVICE) for t in (*given, directions)]


def _all_cotangents(sums: Sequence[Tensor], only: int | None) -> list[Tensor]:
    given = cotangents(sums)
    return [g if only in (None, i) else torch.zeros_like(g) for i, g in enumerate(given)]


def _kernel(args: list[Tensor], only: int | None = None) -> list[Tensor]:
    """The six sums, the weights, the three gradients; `only` names the one sum with a cotangent."""
    *sums, weights = composite_fwd(*args)
    saved = (weights, sums[1], sums[2], sums[4])
    return [*sums, weights, *composite_bwd(*args, *saved, *_all_cotangents(sums, only))]


def _twin(args: list[Tensor], only: int | None = None) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in args[:3]]
    t_starts, t_ends, packed_info, directions = args[3:]
    rays = torch.arange(len(packed_info), device=DEVICE)
    ray_indices = torch.repeat_interleave(rays, packed_info[:, 1])
    result = composite(*leaves, Samples(ray_indices, t_starts, t_ends, packed_info), directions)
    sums = [getattr(result, name) for name in SUMS]
    grads = torch.autograd.grad(sums, leaves, _all_cotangents(sums, only))
    return [*(s.detach() for s in sums), result.weights, *grads]


@pytest.mark.parametrize("counts", [COUNTS, (300,), (0, 0, 0, 0, 0), ()])
def test_matches_twin_in_f64(counts: tuple[int, ...]) -> None:
    args = _inputs(counts=counts)
    ours, twin = _kernel(args), _twin(args)
    if counts == COUNTS:
        opacity = twin[1]
        assert opacity.max() > 0.5 and ((opacity < 0.5) & (opacity > 0)).any()
    assert worst_error(ours, twin) < F64_TOLERANCE


@pytest.mark.parametrize("only", range(len(SUMS)), ids=SUMS)
def test_each_sum_alone_has_the_twins_gradient(only: int) -> None:
    args = _inputs(counts=(5, 1, 0, 40))
    ours, twin = _kernel(args, only)[-3:], _twin(args, only)[-3:]
    assert any(g.count_nonzero() > 0 for g in twin)
    assert worst_error(ours, twin) < F64_TOLERANCE


@pytest.mark.parametrize("densest", [0.01, 60.0, 3000.0])
def test_obeys_single_precision_rule(densest: float) -> None:
    counts = [int(c) for c in rand(14, seed=8) * 150]

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        args = _inputs(dtype, counts, densest)
        return _twin(args) if backend == "reference" else _kernel(args)

    assert_single_precision_rule(run)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("density", [1e8, float("inf")])
def test_opaque_samples_hide_what_is_behind(dtype: torch.dtype, density: float) -> None:
    args = _inputs(dtype, (20, 3))
    args[0][:] = density
    rgb, opacity, depth, normal_sum, z_variance, _, weights, *grads = _kernel(args)
    front = torch.tensor([0, 20], device=DEVICE)
    expected = torch.zeros_like(weights)
    expected[front] = 1.0
    assert torch.equal(weights, expected) and torch.equal(opacity, torch.ones_like(opacity))
    assert torch.equal(rgb, args[1][front]) and torch.equal(normal_sum, args[2][front])
    assert torch.equal(depth, (0.5 * (args[3] + args[4]))[front])
    assert z_variance.count_nonzero() == 0
    # nothing gets through the first sample, so that neither it nor those behind change anything
    assert grads[0].count_nonzero() == 0
    assert grads[1][front].count_nonzero() == 6 and grads[1].count_nonzero() == 6


def test_a_dense_sample_leaves_those_before_it_exact() -> None:
    # the backward subtracts from the whole ray's optical depth, 5e10 here but for its cap
    args = _inputs(counts=(4, 20), densest=4.0)
    dense, opaque = args[0].clone(), args[0].clone()
    dense[-1], opaque[-1] = 2e12, 4e3
    # exp(-100) is as good as 0; the twin's differences of sums would lose digits at 2e12
    assert worst_error(_kernel([dense, *args[1:]]), _twin([opaque, *args[1:]])) < F64_TOLERANCE


def test_transparent_samples_still_have_a_gradient() -> None:
    args = _inputs(counts=(20, 3))
    args[0][:20] = 0.0
    ours, twin = _kernel(args), _twin(args)
    assert ours[1][0] == 0.0 and ours[1][1] > 0.0
    assert ours[-3][:20].count_nonzero() == 20
    assert worst_error(ours, twin) < F64_TOLERANCE


def test_z_variance_needs_half_opacity() -> None:
    opacities = torch.tensor([0.499, 0.501], dtype=F64)
    args = _inputs(counts=(12, 12))
    step = (args[4] - args[3]).reshape(2, 12)
    density = (rand(2, 12, seed=1) + 0.1).to(DEVICE)
    scale = -torch.log1p(-opacities).to(DEVICE) / (density * step).sum(dim=1)
    args[0] = (density * scale[:, None]).reshape(-1)
    index = SUMS.index("z_variance")
    ours, twin = _kernel(args, index), _twin(args, index)
    assert torch.allclose(ours[1].cpu(), opacities, atol=1e-12)
    assert ours[index][0] == 0.0 and ours[index][1] > 0.01
    assert ours[-3][:12].count_nonzero() == 0 and ours[-3][12:].count_nonzero() == 12
    assert worst_error(ours, twin) < F64_TOLERANCE


def test_samples_of_no_ray_and_rows_in_any_order() -> None:
    counts, firsts, n = (5, 0, 12, 3), (22, 3, 7, 28), 35
    args = _inputs(counts=counts)
    expected = _kernel(args)
    pieces = [torch.arange(first, first + c) for first, c in zip(firsts, counts, strict=True)]
    there = torch.cat(pieces).to(DEVICE)
    for i in range(PACKED_INFO):
        packed, args[i] = args[i], args[i].new_full((n, *args[i].shape[1:]), float("nan"))
        args[i][there] = packed
    args[PACKED_INFO][:, 0] = torch.tensor(firsts)
    ours = _kernel(args)
    assert all(torch.equal(a, b) for a, b in zip(ours[:6], expected[:6], strict=True))
    for a, b in zip(ours[6:], expected[6:], strict=True):
        assert torch.equal(a[there], b)
        assert a.count_nonzero() == b.count_nonzero()  # no weight and no gradient elsewhere


def test_rows_that_leave_the_samples_show_and_read_nothing() -> None:
    counts = (5, 4, 6, 3, 7, 2)
    args = _inputs(counts=counts)
    expected = _kernel(args)
    bad = {1: (25, 3), 2: (-1, 6), 4: (0, -2), 5: (2**62, 2**62)}  # of 27 samples
    for ray, row in bad.items():
        args[PACKED_INFO][ray] = torch.tensor(row)
    ours = _kernel(args)
    good = [ray for ray in range(len(counts)) if ray not in bad]
    for name, a, b in zip(SUMS, ours[:6], expected[:6], strict=True):
        assert torch.equal(a[good], b[good]), name
        if name != "z_variance":
            assert a[list(bad)].isnan().all(), name
    assert ours[6].count_nonzero() == sum(counts[ray] for ray in good)
    assert not any(g.isnan().any() for g in ours[7:])


def test_nan_is_not_hidden() -> None:
    args = _inputs(counts=(20, 3))
    args[0][4] = float("nan")
    rgb, opacity, *_, grad_density, _, _ = _kernel(args)
    assert rgb[0].isnan().all() and opacity.isnan().tolist() == [True, False]
    assert grad_density[:20].isnan().all() and not grad_density[20:].isnan().any()


def test_strided_inputs_and_cotangents() -> None:
    args = _inputs(counts=(5, 12))
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in args]
    assert not any(t.is_contiguous() for t in strided)
    ours, expected = composite_fwd(*strided), composite_fwd(*args)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    saved = (expected[6], expected[1], expected[2], expected[4])
    ones = [torch.ones_like(t) for t in expected[:6]]
    spread = [torch.ones((), dtype=F64, device=DEVICE).expand(t.shape) for t in ones]  # of a sum
    for a, b in zip(
        composite_bwd(*strided, *saved, *spread), composite_bwd(*args, *saved, *ones), strict=True
    ):
        assert torch.equal(a, b)


def test_same_bits_twice() -> None:
    args = _inputs(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(_kernel(args), _kernel(args), strict=True))


def test_the_op_reaches_it_by_name() -> None:
    args = _inputs(torch.float32, counts=(5, 0, 12))
    leaves = [t.clone().requires_grad_() for t in args[:3]]
    ray_indices = torch.repeat_interleave(args[PACKED_INFO][:, 1])
    samples = Samples(ray_indices, *args[3:6])
    result = composite_op(*leaves, samples, args[6], backend="triton")
    sums = [getattr(result, name) for name in SUMS]
    grads = torch.autograd.grad(sums, leaves, cotangents(sums))
    ours = [*(s.detach() for s in sums), result.weights, *grads]
    assert all(torch.equal(a, b) for a, b in zip(ours, _kernel(args), strict=True))
    torch.library.opcheck(_forward, (args[0], *leaves[1:], *args[3:], True))


@pytest.mark.gpu
def test_a_graph_captures_it() -> None:
    args = _inputs(torch.float32)
    _kernel(args)  # compiles
    torch.cuda.synchronize()
    sums = composite_fwd(*args)[:6]
    grads = cotangents(sums)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        *captured, weights = composite_fwd(*args)
        saved = (weights, captured[1], captured[2], captured[4])
        captured_grads = composite_bwd(*args, *saved, *grads)
    args[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    expected = _kernel(args)
    ours = [*captured, weights, *captured_grads]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sdi_fast.kernels import composite, convexity

tile = {"rays": composite.RAYS, "block": composite.BLOCK}
integers = ("n_rays", "n_samples", "batch", "height", "width", "view_size")

def compile(kernel, real, constants):
    types = {name: "*" + real for name in kernel.arg_names}
    types |= {name: "i32" for name in integers if name in types}
    types |= {"packed_info": "*i64"} if "packed_info" in types else {}
    types |= {name: "constexpr" for name in constants}
    source = ASTSource(kernel, types, constexprs=constants)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    assert binary.asm["cubin"]

for real, order in zip(("fp32", "fp64"), composite.SERIES_ORDER.values()):
    compile(composite._composite_fwd, real, tile | {"order": order})
    compile(composite._composite_bwd, real, tile)
    compile(convexity._convexity_fwd, real, {})
    compile(convexity._convexity_bwd, real, {})
print("compiled")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile the kernels")
def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    compile_in_child(COMPILE, tmp_path)
