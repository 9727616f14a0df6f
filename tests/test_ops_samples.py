"""C++ kernels of marching, pruning, the occupancy update and Adam, against their twins."""

from __future__ import annotations

import math

import pytest
import torch
from ops_cases import F64, as_tuple, rand, randn, random_samples, rays_at

from sdi_fast.ops.adam import adam_step
from sdi_fast.ops.composite import composite
from sdi_fast.ops.march import march
from sdi_fast.ops.occupancy import update_occupancy
from sdi_fast.ops.prune import prune
from sdi_fast.types import Samples


def _assert_same(ours: Samples, twin: Samples) -> None:
    assert ours.n_samples > 0
    for a, b in zip(as_tuple(ours), as_tuple(twin), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("distance", [0.0, 1.7, 9.0])  # inside, near a face, outside the box
@pytest.mark.parametrize("with_jitter", [False, True])
def test_march_keeps_exactly_the_twins_samples(
    dtype: torch.dtype, distance: float, with_jitter: bool
) -> None:
    origins, directions = rays_at(257, dtype, distance)
    occupancy = rand(8, 8, 8, seed=3) > 0.5
    jitter = (rand(257, seed=4) * 0.01).to(dtype) if with_jitter else None
    args = (origins, directions, occupancy, 2.0, 0.0137, 0.1, jitter)
    _assert_same(march(*args, backend="cpu"), march(*args, backend="reference"))


def test_march_along_axes_and_faces() -> None:
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    starts = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [2.0, 2.0, 2.0], [-2.0, -2.0, -2.0]])
    origins = starts.repeat_interleave(6, dim=0) - 0.25 * axes.repeat(4, 1)
    occupancy = torch.ones(4, 4, 4, dtype=torch.bool)
    args = (origins, axes.repeat(4, 1), occupancy, 2.0, 0.05, 0.0, None)
    _assert_same(march(*args, backend="cpu"), march(*args, backend="reference"))


def test_march_of_nothing() -> None:
    origins, directions = rays_at(5, torch.float32)
    empty = torch.zeros(4, 4, 4, dtype=torch.bool)
    samples = march(origins, directions, empty, 2.0, 0.1, 0.0, backend="cpu")
    assert samples.n_samples == 0 and samples.packed_info.tolist() == [[0, 0]] * 5
    none = march(origins[:0], directions[:0], ~empty, 2.0, 0.1, 0.0, backend="cpu")
    assert none.n_samples == 0 and none.packed_info.shape == (0, 2)


def test_march_ignores_broken_rays() -> None:
    origins = torch.tensor([[float("nan")] * 3, [0.0, 0.0, 0.0], [float("inf"), 0.0, 0.0]])
    directions = torch.tensor([[1.0, 0.0, 0.0], [float("nan")] * 3, [1.0, 0.0, 0.0]])
    samples = march(
        origins, directions, torch.ones(2, 2, 2, dtype=torch.bool), 2.0, 0.1, 0.0, backend="cpu"
    )
    assert samples.n_samples == 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_prune_keeps_exactly_the_twins_samples(dtype: torch.dtype) -> None:
    samples = random_samples((50, 0, 1, 300, 7), dtype=dtype)
    density = (rand(samples.n_samples, seed=5) ** 4 * 40.0).to(dtype)
    args = (samples, density, 1e-4, 0.01)
    ours, twin = prune(*args, backend="cpu"), prune(*args, backend="reference")
    assert 0 < ours.n_samples < samples.n_samples
    _assert_same(ours, twin)


def test_prune_can_drop_everything() -> None:
    samples = random_samples((4, 3))
    result = prune(samples, torch.zeros(7, dtype=F64), 1e-4, 0.01, backend="cpu")
    assert result.n_samples == 0 and result.packed_info.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_occupancy_matches_twin(dtype: torch.dtype) -> None:
    start = (rand(512, seed=1) * 0.02).to(dtype)
    cells = (rand(300, seed=2) * 512).long()  # with repeats, and cells that are left out
    values = (rand(300, seed=3) * 0.02).to(dtype)
    ours, twin = start.clone(), start.clone()
    for _ in range(3):
        a = update_occupancy(ours, cells, values, 0.95, 0.01, backend="cpu")
        b = update_occupancy(twin, cells, values, 0.95, 0.01, backend="reference")
        assert torch.equal(ours, twin) and torch.equal(a, b)
    assert a.shape == (8, 8, 8) and 0 < int(a.sum()) < 512


@pytest.mark.parametrize("n_given", [0, 1, 5000])
def test_occupancy_of_the_whole_grid(n_given: int) -> None:
    """More cells and values than one block of the GPU takes."""
    start = (rand(32**3, seed=1) * 0.02).float()
    cells = (rand(n_given, seed=2) * 32**3).long()
    values = (rand(n_given, seed=3) * 0.02).float()
    ours, twin = start.clone(), start.clone()
    a = update_occupancy(ours, cells, values, 0.95, 0.01, backend="cpu")
    b = update_occupancy(twin, cells, values, 0.95, 0.01, backend="reference")
    assert torch.equal(ours, twin) and torch.equal(a, b)
    assert torch.equal(start, ours) == (n_given == 0)


def test_occupancy_takes_the_mean_as_threshold_where_it_is_smaller() -> None:
    occs = torch.full((4096,), 0.1)  # its f32 sum is off, the mean of equal numbers is not
    none = torch.zeros(0, dtype=torch.int64)
    assert not update_occupancy(occs, none, torch.zeros(0), 0.95, 1.0, backend="cpu").any()
    assert update_occupancy(occs, none, torch.zeros(0), 0.95, 0.09, backend="cpu").all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_occupancy_nan_shows_in_any_order(dtype: torch.dtype) -> None:
    nan = float("nan")
    start = torch.tensor([0.5, nan, 0.5, 0.5, 0.5, nan, 0.5, 0.5], dtype=dtype)
    cells = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    values = torch.tensor([0.7, nan, 0.1, 0.3, 0.2, 0.6, 0.0], dtype=dtype)
    expected = torch.tensor([nan, nan, 0.6, 0.25, 0.5, nan, 0.5, 0.5], dtype=dtype)
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [1, 0, 2, 5, 3, 6, 4]):
        for backend in ("cpu", "reference"):
            occs = start.clone()
            occupied = update_occupancy(
                occs, cells[order], values[order], 0.5, 0.01, backend=backend
            )
            torch.testing.assert_close(occs, expected, rtol=0, atol=0, equal_nan=True)
            assert not occupied.any()  # the mean is NaN


def _adam_state(n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [randn(n, seed=1, dtype=dtype), *(torch.zeros(n, dtype=dtype) for _ in range(2))]


# f32: the two round in different orders, an ulp or two a step
@pytest.mark.parametrize("dtype,tolerance", [(F64, 1e-13), (torch.float32, 2e-6)])
def test_adam_matches_twin_and_torch(dtype: torch.dtype, tolerance: float) -> None:
    n = 5003
    ours, twin = _adam_state(n, dtype), _adam_state(n, dtype)
    official = ours[0].clone().requires_grad_()
    optimiser = torch.optim.Adam([official], lr=1e-2, betas=(0.9, 0.99), eps=1e-15)
    for step in range(1, 8):
        grad = randn(n, seed=10 + step, dtype=dtype) * (rand(n, seed=50 + step) > 0.3).to(dtype)
        for state, backend in ((ours, "cpu"), (twin, "reference")):
            param, m, v = state
            adam_step(param, grad, m, v, step, 1e-2, (0.9, 0.99), 1e-15, backend=backend)
        official.grad = grad
        optimiser.step()
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[0], official.detach(), rtol=tolerance, atol=tolerance)


def test_adam_leaves_what_is_at_rest_alone_and_moves_the_rest() -> None:
    n = 4096
    param, m, v = _adam_state(n, torch.float32)
    grad = torch.zeros(n)
    grad[2500] = 1.0
    before = param.clone()
    for step in (1, 2):
        adam_step(param, grad, m, v, step, 1e-2, (0.9, 0.99), 1e-15, backend="cpu")
    moved = torch.nonzero(param != before)[:, 0].tolist()
    assert moved == [2500]
    grad.zero_()  # the moment alone still moves it
    again = param.clone()
    adam_step(param, grad, m, v, 3, 1e-2, (0.9, 0.99), 1e-15, backend="cpu")
    assert torch.nonzero(param != again)[:, 0].tolist() == [2500]


def test_adam_shows_nan() -> None:
    param, m, v = _adam_state(40, torch.float32)
    grad = torch.zeros(40)
    grad[3] = float("nan")
    adam_step(param, grad, m, v, 1, 1e-2, (0.9, 0.99), 1e-15, backend="cpu")
    assert param[3].isnan() and int(param.isnan().sum()) == 1


def test_adam_without_eps_is_the_twins_nan_at_rest() -> None:
    results = []
    for backend in ("cpu", "reference"):
        param, m, v = _adam_state(40, torch.float32)
        grad = torch.zeros(40)
        grad[3] = 2.0
        adam_step(param, grad, m, v, 1, 1e-2, (0.9, 0.99), 0.0, backend=backend)
        results.append(param)
    torch.testing.assert_close(*results, rtol=2e-6, atol=0.0, equal_nan=True)
    assert int(results[0].isnan().sum()) == 39


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_adam_reads_step_and_rate_from_tensors(dtype: torch.dtype, backend: str) -> None:
    n = 1503
    plain, given = _adam_state(n, dtype), _adam_state(n, dtype)
    step_at, lr_at = torch.tensor(0), torch.zeros((), dtype=F64)
    for step in range(1, 5):
        grad = randn(n, seed=step, dtype=dtype)
        rate = 1e-2 / step
        adam_step(plain[0], grad, *plain[1:], step, rate, (0.9, 0.99), 1e-15, backend=backend)
        step_at.add_(1)
        lr_at.fill_(rate)
        adam_step(given[0], grad, *given[1:], step_at, lr_at, (0.9, 0.99), 1e-15, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))
    assert not torch.equal(plain[0], _adam_state(n, dtype)[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_adam_skips_where_told(backend: str) -> None:
    state = [*_adam_state(1503, torch.float32)]
    state.append(state[0].half())
    before = [t.clone() for t in state]
    grad = torch.full((1503,), float("inf"))
    for skip, same in ((True, True), (False, False)):
        adam_step(
            state[0], grad, state[1], state[2], 1, 1e-2, (0.9, 0.99), 1e-15,
            shadow=state[3], skip=torch.tensor(skip), backend=backend,
        )  # fmt: skip
        assert all(torch.equal(a, b) == same for a, b in zip(state, before, strict=True))


# which of param, grad, the moments and the shadow start off their 16 (8) byte alignment
@pytest.mark.parametrize("shifted", [(), (0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [1, 3, 1024, 2050])
def test_adam_keeps_the_shadow(dtype: torch.dtype, shifted: tuple[int, ...], n: int) -> None:
    def placed(i: int, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:1], value])[1:] if i in shifted else value.clone()

    results = []
    for backend in ("cpu", "reference"):
        param, m, v = _adam_state(n, dtype)
        param, m, v = placed(0, param), placed(2, m), placed(3, v)
        shadow = placed(4, param.half())
        for step in range(1, 4):
            grad = randn(n, seed=step, dtype=dtype)
            grad[::3] = 0.0  # some stay at rest
            adam_step(
                param, placed(1, grad), m, v, step, 1e-2, (0.9, 0.99), 1e-15,
                shadow=shadow, backend=backend,
            )  # fmt: skip
        assert torch.equal(shadow, param.half())
        results.append([param, m, v])
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13  # as above
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_adams_shadow_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """Every half, the middle between each and the next, and both sides of that middle."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    exact = halves[halves.isfinite()].float().unique()  # in order
    middle = (exact[1:] + exact[:-1]) / 2  # exact in f32
    huge = torch.tensor([65519.99, 65520.0, 65536.0, 1e30, float("inf"), float("nan"), 1e-8, 1e-45])
    up, down = (torch.full_like(middle, side) for side in (float("inf"), -float("inf")))
    points = [exact, middle, middle.nextafter(up), middle.nextafter(down), huge, -huge]
    param = torch.cat(points).to(dtype)
    shadow = torch.zeros_like(param, dtype=torch.float16)
    ones = torch.ones_like(param)  # a rate of zero leaves the parameters as they are
    before = param.clone()
    adam_step(
        param, ones, ones.clone(), ones.clone(), 1, 0.0, (0.9, 0.99), 1e-15,
        shadow=shadow, backend="cpu",
    )  # fmt: skip
    torch.testing.assert_close(param, before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(shadow, before.half(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(shadow.signbit(), before.half().signbit())  # of zeros, too


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_density_that_is_not_finite_spoils_its_own_ray_alone(value: float) -> None:
    """The rest of that ray is dropped or black; the rays behind it are as ever."""
    samples = random_samples((4, 5, 3))
    density = rand(12, seed=5) * 20.0
    density[1] = value
    ours = prune(samples, density, 1e-4, 1e-3)
    twin = prune(samples, density, 1e-4, 1e-3, backend="reference")
    for a, b in zip(as_tuple(ours), as_tuple(twin), strict=True):
        assert torch.equal(a, b)
    assert twin.packed_info[:, 1].tolist() == [1 if math.isnan(value) else 2, 5, 3]

    rgb, normal, directions = rand(12, 3, seed=6), randn(12, 3, seed=7), randn(3, 3, seed=8)
    sums = [
        composite(density, rgb, normal, samples, directions, backend=backend)
        for backend in ("auto", "reference")
    ]
    for name in ("rgb", "opacity", "depth", "normal_sum", "weights"):
        a, b = (getattr(s, name) for s in sums)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert sums[1].opacity.isnan().tolist() == [math.isnan(value), False, False]
