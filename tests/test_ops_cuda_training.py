"""CUDA kernels of the training ops against their twins, on streams and in CUDA graphs.

Convexity loss, losses on rays, Adam, occupancy update. What these kernels compute is also tested
without a GPU, through tests/emulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from ops_cases import (
    F64,
    F64_TOLERANCE,
    assert_single_precision_rule,
    outputs_and_grads,
    rand,
    randn,
    worst_error,
)
from torch import Tensor

from sdi_fast.config import RenderConfig
from sdi_fast.occupancy import OccupancyGrid
from sdi_fast.ops.adam import adam_step
from sdi_fast.ops.convexity import convexity_loss
from sdi_fast.ops.occupancy import update_occupancy
from sdi_fast.ops.ray_losses import ray_losses

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
NUMBERS = ((0.9, 0.99), 1e-15)  # Adam's betas and eps
Run = Callable[[], list[Tensor]]


def there(*tensors: Tensor, dtype: torch.dtype = F64) -> list[Tensor]:
    """Leaves on the GPU, the same numbers in both precisions."""
    return [t.float().to(DEVICE, dtype).requires_grad_() for t in tensors]


def gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The output and the leaves' gradients."""
    outputs, grads = outputs_and_grads(lambda: torch.atleast_1d(function(*leaves)), leaves)
    return [t.detach() for t in outputs + grads]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_takes_the_current_stream(run: Run) -> None:
    """`run` on a side stream that is kept busy: read there, the results are the same."""
    expected = [t.clone() for t in run()]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        copies = [t.clone() for t in run()]  # the stream's memory, so that nothing waits for any
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)  # some 50 ms: whoever does not queue behind it is early
        copies = [t.clone() for t in run()]
    assert not side.query()  # nothing of it waited for the device
    side.synchronize()
    assert equal(copies, expected)


def assert_replays(run: Run, inputs: Sequence[Tensor], change: Callable[[int], None]) -> None:
    """A captured `run` follows its inputs: after every change it gives what an eager run does.

    `inputs` are what `run` reads or writes; `change(i)` gives them new values.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # what is made at the first call
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    previous = [t.clone() for t in captured]
    for i in range(3):
        change(i)
        before = [t.detach().clone() for t in inputs]
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.clone() for t in captured]
        assert not equal(replayed, previous)  # else the changes would not show
        with torch.no_grad():
            for tensor, value in zip(inputs, before, strict=True):
                tensor.copy_(value)
        assert equal(replayed, [t.clone() for t in run()])
        previous = replayed


# ---- convexity loss ---------------------------------------------------------------------------

FRAMES = ["world", "camera"]
CONVEXITY_SIZES = [(1, 8, 8), (2, 31, 33), (1, 3, 5), (70, 9, 4), (1, 512, 512), (2, 301, 500)]


def convexity(
    size: tuple[int, int, int], frame: str, dtype: torch.dtype = F64
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The loss as a function of (leaves, backend), and the leaves."""
    normals, opacity = rand(*size, 3, seed=1), rand(*size, 1, seed=2)
    c2w = randn(size[0], 3, 4, seed=3).float().to(DEVICE, dtype)
    if frame == "world":
        return convexity_loss, there(normals, dtype=dtype)

    def loss(normals: Tensor, opacity: Tensor, backend: str) -> Tensor:
        return convexity_loss(normals, opacity, c2w, backend=backend)

    return loss, there(normals, opacity, dtype=dtype)


def run_convexity(
    size: tuple[int, int, int], frame: str, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    loss, leaves = convexity(size, frame, dtype)
    return gradients(lambda *inputs: loss(*inputs, backend=backend), leaves)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("size", CONVEXITY_SIZES)
def test_convexity_matches_twin(size: tuple[int, int, int], frame: str) -> None:
    ours, twin = (run_convexity(size, frame, F64, b) for b in ("cuda", "reference"))
    assert worst_error(ours, twin) < F64_TOLERANCE
    assert_single_precision_rule(
        lambda dtype, b: run_convexity(size, frame, dtype, "cuda" if b == "cpu" else b)
    )


@pytest.mark.parametrize("frame", FRAMES)
def test_convexity_gradcheck(frame: str) -> None:
    loss, leaves = convexity((2, 9, 12), frame)
    assert torch.autograd.gradcheck(lambda *inputs: loss(*inputs, backend="cuda"), leaves)


def test_convexity_off_alignment() -> None:
    """Rows of 12 and 36 bytes: neither they nor their starts fit 16-byte stores."""
    for width in (1, 3):
        size = (3, 40, width)
        ours, twin = (run_convexity(size, "camera", F64, b) for b in ("cuda", "reference"))
        assert worst_error(ours, twin) < F64_TOLERANCE


@pytest.mark.parametrize("frame", FRAMES)
def test_convexity_on_a_stream_and_in_a_graph(frame: str) -> None:
    loss, leaves = convexity((2, 65, 64), frame, torch.float32)

    def run() -> list[Tensor]:
        value = loss(*leaves, backend="cuda")
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    def change(i: int) -> None:
        with torch.no_grad():
            for k, leaf in enumerate(leaves):
                leaf.copy_(rand(*leaf.shape, seed=100 + 10 * i + k))

    assert equal(run(), run())
    assert_takes_the_current_stream(run)
    assert_replays(run, leaves, change)


# ---- losses on rays ---------------------------------------------------------------------------


def run_ray_losses(n: int, dtype: torch.dtype, backend: str) -> list[Tensor]:
    opacity = rand(n, seed=1)
    opacity[::5], opacity[1::7], opacity[2::11] = 0.0, 1.0, 0.5
    leaves = there(opacity, rand(n, seed=2), rand(n, seed=3), dtype=dtype)
    return gradients(lambda *inputs: ray_losses(*inputs, backend=backend), leaves)


@pytest.mark.parametrize("n", [1, 255, 257, 5000, 512 * 512 + 3])
def test_ray_losses_match_twin(n: int) -> None:
    ours, twin = (run_ray_losses(n, F64, backend) for backend in ("cuda", "reference"))
    assert worst_error(ours, twin) < F64_TOLERANCE
    assert_single_precision_rule(
        lambda dtype, b: run_ray_losses(n, dtype, "cuda" if b == "cpu" else b)
    )


def test_ray_losses_gradcheck() -> None:
    leaves = [(rand(11, seed=i) * 0.9 + 0.05).to(DEVICE).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(lambda *x: ray_losses(*x, backend="cuda"), leaves)


def test_ray_losses_of_nothing() -> None:
    leaves = [torch.zeros(0, device=DEVICE, requires_grad=True) for _ in range(3)]
    losses = ray_losses(*leaves, backend="cuda")
    assert losses.isnan().tolist() == [False, True, True, False]
    assert all(g.shape == (0,) for g in torch.autograd.grad(losses.sum(), leaves))


def test_ray_losses_on_a_stream_and_in_a_graph() -> None:
    leaves = there(*(rand(10_000, seed=i) for i in range(3)), dtype=torch.float32)

    def run() -> list[Tensor]:
        losses = ray_losses(*leaves, backend="cuda")
        return [losses.detach(), *torch.autograd.grad(losses.square().sum(), leaves)]

    def change(i: int) -> None:
        with torch.no_grad():
            for k, leaf in enumerate(leaves):
                leaf.copy_(rand(10_000, seed=100 + 10 * i + k))

    assert equal(run(), run())
    assert_takes_the_current_stream(run)
    assert_replays(run, leaves, change)


# ---- Adam -------------------------------------------------------------------------------------


def adam_state(n: int, dtype: torch.dtype) -> list[Tensor]:
    """Parameters, moments and shadow."""
    param = randn(n, seed=1, dtype=dtype).to(DEVICE)
    return [param, torch.zeros_like(param), torch.zeros_like(param), param.half()]


def first_step(arrays: Sequence[Tensor]) -> None:
    """The first step of (param, moments, shadow, grad)."""
    param, m, v, shadow, grad = arrays
    adam_step(param, grad, m, v, 1, 1e-2, *NUMBERS, shadow=shadow, backend="cuda")


def sparse_grad(n: int, step: int, dtype: torch.dtype) -> Tensor:
    """Zero in runs of 16, so that whole vectors stay at rest, and in single places."""
    still = (torch.arange(n) // 16 % 3 == 0) | (rand(n, seed=50 + step) < 0.3)
    return (randn(n, seed=10 + step) * ~still).to(DEVICE, dtype)


# f32: the two round in different orders, an ulp or two a step
@pytest.mark.parametrize("dtype,tolerance", [(F64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("n", [1, 3, 5003, 1_000_003])  # the last: several turns of the grid
def test_adam_matches_twin(dtype: torch.dtype, tolerance: float, n: int) -> None:
    ours, twin = adam_state(n, dtype), adam_state(n, dtype)
    for step in range(1, 5):
        grad = sparse_grad(n, step, dtype)
        for (param, m, v, shadow), backend in ((ours, "cuda"), (twin, "reference")):
            adam_step(param, grad, m, v, step, 1e-2, *NUMBERS, shadow=shadow, backend=backend)
    for a, b in zip(ours[:3], twin[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[3], ours[0].half())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_adam_takes_arrays_off_their_alignment(dtype: torch.dtype) -> None:
    """Each one of param, moments, shadow and gradient, and all: 16-byte accesses would fail."""
    n = 5003
    grad = sparse_grad(n, 1, dtype)
    aligned = [*adam_state(n, dtype), grad]
    first_step(aligned)
    for shifted in ({0}, {1}, {2}, {3}, {4}, {0, 1, 2, 3, 4}):
        arrays = [
            torch.cat([t[:1], t])[1:] if i in shifted else t
            for i, t in enumerate([*adam_state(n, dtype), grad])
        ]
        first_step(arrays)
        assert equal(arrays, aligned)


def test_adam_shows_nan_and_leaves_the_rest_alone() -> None:
    param, m, v, shadow = adam_state(5000, torch.float32)
    before = param.clone()
    grad = torch.zeros(5000, device=DEVICE)
    grad[2501] = float("nan")
    adam_step(param, grad, m, v, 1, 1e-2, *NUMBERS, shadow=shadow, backend="cuda")
    assert param[2501].isnan() and shadow[2501].isnan()
    assert torch.nonzero(param != before)[:, 0].tolist() == [2501]


@pytest.mark.parametrize("skip", [False, True])
def test_adam_skips_where_told(skip: bool) -> None:
    state = adam_state(5000, torch.float32)
    before = [t.clone() for t in state]
    param, m, v, shadow = state
    grad = sparse_grad(5000, 1, torch.float32)
    flag = torch.tensor(skip, device=DEVICE)
    adam_step(param, grad, m, v, 1, 1e-2, *NUMBERS, shadow=shadow, skip=flag, backend="cuda")
    assert [torch.equal(a, b) for a, b in zip(state, before, strict=True)] == [skip] * 4


def test_adam_with_numbers_on_the_device_equals_adam_with_plain_ones() -> None:
    plain, given = adam_state(70_001, torch.float32), adam_state(70_001, torch.float32)
    step_at = torch.zeros((), dtype=torch.int64, device=DEVICE)
    lr_at = torch.zeros((), dtype=F64, device=DEVICE)
    for step in range(1, 6):
        grad = sparse_grad(70_001, step, torch.float32)
        step_at.add_(1)
        lr_at.fill_(0.1 / step)
        for state, numbers in ((plain, (step, 0.1 / step)), (given, (step_at, lr_at))):
            param, m, v, shadow = state
            adam_step(param, grad, m, v, *numbers, *NUMBERS, shadow=shadow, backend="cuda")
    # pow of the host and of the device: an ulp of f64 apart, which may round to another f32
    for a, b in zip(plain[:3], given[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adam_on_a_stream_and_in_a_graph() -> None:
    n = 5003
    state = adam_state(n, torch.float32)
    grad = sparse_grad(n, 0, torch.float32)
    step_at = torch.ones((), dtype=torch.int64, device=DEVICE)
    lr_at = torch.full((), 1e-2, dtype=F64, device=DEVICE)
    flag = torch.tensor(False, device=DEVICE)
    start = [t.clone() for t in state]

    def run() -> list[Tensor]:
        param, m, v, shadow = state
        step_at.add_(1)
        adam_step(
            param, grad, m, v, step_at, lr_at, *NUMBERS, shadow=shadow, skip=flag, backend="cuda"
        )
        return state

    def restart() -> list[Tensor]:
        for tensor, value in zip(state, start, strict=True):
            tensor.copy_(value)
        step_at.fill_(1)
        return [t.clone() for t in run()]

    def change(i: int) -> None:
        grad.copy_(sparse_grad(n, i, torch.float32))
        lr_at.fill_(0.1 / (i + 1))

    assert_takes_the_current_stream(restart)
    assert_replays(run, [*state, step_at], change)
    # and the flag is read anew as well
    flag.fill_(True)
    before = [t.clone() for t in state]
    assert equal(run(), before)


# ---- occupancy --------------------------------------------------------------------------------


def occupancy_inputs(
    n_given: int, dtype: torch.dtype, side: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """occs, cells with repeats, values."""
    n_cells = side**3
    occs = (rand(n_cells, seed=1) * 0.02).to(DEVICE, dtype)
    cells = (rand(n_given, seed=2) * n_cells).long().to(DEVICE)
    return occs, cells, (rand(n_given, seed=3) * 0.02).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("side,n_given", [(1, 3), (7, 100), (32, 0), (32, 16384), (50, 70_001)])
def test_occupancy_equals_the_cpu(dtype: torch.dtype, side: int, n_given: int) -> None:
    occs, cells, values = occupancy_inputs(n_given, dtype, side)
    ours, cpus = occs.clone(), occs.cpu()
    for _ in range(3):
        a = update_occupancy(ours, cells, values, 0.95, 0.01, backend="cuda")
        b = update_occupancy(cpus, cells.cpu(), values.cpu(), 0.95, 0.01)
        assert torch.equal(ours.cpu(), cpus) and torch.equal(a.cpu(), b)
    assert side < 32 or 0 < int(a.sum()) < side**3


def test_occupancy_nan_shows_and_cells_outside_are_passed_over() -> None:
    nan = float("nan")
    occs = torch.tensor([0.5, nan, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], device=DEVICE)
    cells = torch.tensor([0, 0, 1, 2, 2, -1, 8, 2**40], device=DEVICE)
    values = torch.tensor([nan, 0.7, 0.3, 0.2, 0.6, 9.0, 9.0, nan], device=DEVICE)
    expected = torch.tensor([nan, nan, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5], device=DEVICE)
    occupied = update_occupancy(occs, cells, values, 0.5, 0.01, backend="cuda")
    torch.testing.assert_close(occs, expected, rtol=0, atol=0, equal_nan=True)
    assert not occupied.any()  # the mean is NaN


def test_occupancy_on_a_stream_and_in_a_graph() -> None:
    occs, cells, values = occupancy_inputs(16384, torch.float32)
    start = occs.clone()

    def run() -> list[Tensor]:
        return [update_occupancy(occs, cells, values, 0.95, 0.01, backend="cuda"), occs]

    def restart() -> list[Tensor]:
        occs.copy_(start)
        return [t.clone() for t in run()]

    def change(i: int) -> None:
        cells.copy_((rand(16384, seed=100 + i) * occs.numel()).long())
        values.copy_(rand(16384, seed=200 + i) * 0.02)

    assert_takes_the_current_stream(restart)
    assert_replays(run, [occs], change)


def test_the_grid_updates_without_a_synchronisation() -> None:
    config = RenderConfig()
    grid = OccupancyGrid(config, radius=2.0, device=DEVICE)
    draws = torch.Generator(DEVICE).manual_seed(0)

    def ball(x: Tensor) -> Tensor:
        return 20.0 * (x.norm(dim=-1) < 0.8)

    def updates() -> Tensor:
        for step in (0, 256, 272, 288):
            grid.update(step, ball, config, draws)
        return grid.mean_tensor()

    updates()  # what is made at the first call
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mean = updates()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert mean.item() == grid.mean() > 0
    centres = (torch.arange(32, device=DEVICE) + 0.5) / 8 - 2.0
    distance = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij")).norm(dim=0)
    assert grid.binary[distance < 0.6].all()
    assert not grid.binary[distance > 1.0].any()
