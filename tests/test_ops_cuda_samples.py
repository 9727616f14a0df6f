"""The CUDA kernels of marching and pruning against their twins on the CPU: sample by sample."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ops_cases import F64, as_tuple, rand, random_samples, rays_at
from torch import Tensor

from sdi_fast.ops.march import march
from sdi_fast.ops.prune import prune
from sdi_fast.types import Samples

pytestmark = pytest.mark.gpu


def _assert_same(ours: Samples, twin: Samples) -> None:
    assert ours.n_samples > 0
    for a, b in zip(as_tuple(ours), as_tuple(twin), strict=True):
        assert a.is_cuda and a.dtype == b.dtype and torch.equal(a.cpu(), b)


def _march(
    origins: Tensor, directions: Tensor, occupancy: Tensor, jitter: Tensor | None, step: float
) -> tuple[Samples, Samples]:
    """On the GPU and by the twin."""
    rays = (origins, directions, occupancy)
    there = None if jitter is None else jitter.cuda()
    lengths = (2.0, step, 0.1)
    ours = march(*(t.cuda() for t in rays), *lengths, there, backend="cuda")
    return ours, march(*rays, *lengths, jitter, backend="reference")


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("distance", [0.0, 1.7, 9.0])  # inside, near a face, outside the box
@pytest.mark.parametrize("with_jitter", [False, True])
def test_march_keeps_exactly_the_twins_samples(
    dtype: torch.dtype, distance: float, with_jitter: bool
) -> None:
    # many, so that some midpoints are within a rounding of a cell's face
    n = 5003
    origins, directions = rays_at(n, dtype, distance)
    occupancy = rand(32, 32, 32, seed=3) > 0.5
    jitter = (rand(n, seed=4) * 0.01).to(dtype) if with_jitter else None
    _assert_same(*_march(origins, directions, occupancy, jitter, 0.0137))


@pytest.mark.parametrize("n", [1, 7, 8, 9])  # a block takes 8 rays
def test_march_of_few_rays(n: int) -> None:
    origins, directions = rays_at(n, torch.float32)
    _assert_same(*_march(origins, directions, rand(8, 8, 8, seed=3) > 0.5, None, 0.05))


def test_march_along_axes_and_faces() -> None:
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    starts = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [2.0, 2.0, 2.0], [-2.0, -2.0, -2.0]])
    origins = starts.repeat_interleave(6, dim=0) - 0.25 * axes.repeat(4, 1)
    occupancy = torch.ones(4, 4, 4, dtype=torch.bool)
    _assert_same(*_march(origins, axes.repeat(4, 1), occupancy, None, 0.05))


def test_march_of_nothing_and_of_broken_rays() -> None:
    origins, directions = (t.cuda() for t in rays_at(5, torch.float32))
    empty = torch.zeros(4, 4, 4, dtype=torch.bool, device="cuda")
    samples = march(origins, directions, empty, 2.0, 0.1, 0.0, backend="cuda")
    assert samples.n_samples == 0 and samples.packed_info.tolist() == [[0, 0]] * 5
    none = march(origins[:0], directions[:0], ~empty, 2.0, 0.1, 0.0, backend="cuda")
    assert none.n_samples == 0 and none.packed_info.shape == (0, 2)
    origins[0], directions[1], origins[2] = float("nan"), float("nan"), float("inf")
    broken = march(origins, directions, ~empty, 2.0, 0.1, 0.0, backend="cuda")
    assert [count > 0 for count in broken.packed_info[:, 1].tolist()] == [False] * 3 + [True] * 2


def _cuda(samples: Samples) -> Samples:
    return Samples(*(t.cuda() for t in as_tuple(samples)))


# exp differs by a rounding: no alpha or transmittance of this data is that close to its threshold
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_prune_keeps_exactly_the_twins_samples(dtype: torch.dtype) -> None:
    samples = random_samples([50, 0, 1, 300, 7, *([13] * 200)], dtype=dtype)
    density = (rand(samples.n_samples, seed=5).float() ** 4 * 40.0).to(dtype)
    ours = prune(_cuda(samples), density.cuda(), 1e-4, 0.01, backend="cuda")
    twin = prune(samples, density, 1e-4, 0.01, backend="reference")
    assert 0 < ours.n_samples < samples.n_samples
    _assert_same(ours, twin)


def test_prune_can_drop_everything_and_have_nothing() -> None:
    samples = _cuda(random_samples((4, 3)))
    zeros = torch.zeros(7, dtype=F64, device="cuda")
    result = prune(samples, zeros, 1e-4, 0.01, backend="cuda")
    assert result.n_samples == 0 and result.packed_info.tolist() == [[0, 0], [0, 0]]
    none = prune(_cuda(random_samples(())), zeros[:0], 1e-4, 0.01, backend="cuda")
    assert none.n_samples == 0 and none.packed_info.shape == (0, 2)


def test_rows_that_leave_the_samples_count_as_empty() -> None:
    samples = _cuda(random_samples((5, 4, 6, 3, 7, 2)))
    density = torch.full((27,), 1.0, dtype=F64, device="cuda")
    rows = samples.packed_info.clone()
    for ray, row in {1: (25, 3), 2: (-1, 6), 4: (0, -2), 5: (2**62, 2**62)}.items():
        rows[ray] = torch.tensor(row, device="cuda")
    result = prune(
        dataclasses.replace(samples, packed_info=rows), density, 1e-4, 0.01, backend="cuda"
    )
    assert result.packed_info[:, 1].tolist() == [5, 0, 0, 3, 0, 0]
    assert result.ray_indices.tolist() == [0] * 5 + [3] * 3


def test_both_take_the_current_stream() -> None:
    origins, directions = (t.cuda() for t in rays_at(500, F64))
    occupancy = (rand(8, 8, 8, seed=3) > 0.5).cuda()

    def run() -> list[Tensor]:
        samples = march(origins, directions, occupancy, 2.0, 0.02, 0.0, backend="cuda")
        kept = prune(samples, samples.t_starts * 3.0, 1e-4, 0.05, backend="cuda")
        return [*as_tuple(samples), *as_tuple(kept)]

    expected = run()
    there = origins.clone()
    origins.add_(0.5)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: whoever does not wait sees the moved rays
        origins.copy_(there)
        ours = run()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
