"""Triton convexity loss against its twin: on the GPU if there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from ops_cases import F64, F64_TOLERANCE, assert_single_precision_rule, rand, worst_error
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from sdi_fast.kernels.convexity import convexity_bwd, convexity_fwd
from sdi_fast.ops.convexity import _triton_forward
from sdi_fast.ops.convexity import convexity_loss as convexity_op
from sdi_fast.reference.convexity import convexity_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRAD = 3.0
# Below 16 pixels a side taps coincide; at 8 and its odd multiples the second tap has no share.
HEIGHTS_WIDTHS = [(1, 8), (8, 1), (8, 24), (5, 64), (13, 5), (16, 7), (31, 33), (2, 3)]
SIZES = [(1 + i % 3, *size) for i, size in enumerate(HEIGHTS_WIDTHS)]  # with batches of 1 to 3


def _normals(size: tuple[int, int, int], dtype: torch.dtype = F64) -> Tensor:
    return rand(*size, 3, seed=1).float().to(dtype).to(DEVICE)


def _kernel(normals: Tensor) -> list[Tensor]:
    """The loss and the gradient for a cotangent."""
    return [convexity_fwd(normals), convexity_bwd(normals, normals.new_tensor(GRAD))]


def _twin(normals: Tensor) -> list[Tensor]:
    leaf = normals.clone().requires_grad_()
    loss = convexity_loss(leaf)
    return [loss.detach(), torch.autograd.grad(loss * GRAD, leaf)[0]]


@pytest.mark.parametrize("size", SIZES)
def test_matches_twin_in_f64(size: tuple[int, int, int]) -> None:
    twin = _twin(_normals(size))
    assert all(t.count_nonzero() > 0 for t in twin)
    assert worst_error(_kernel(_normals(size)), twin) < F64_TOLERANCE


def test_one_pixel_has_no_neighbours() -> None:
    loss, grad = _kernel(_normals((1, 1, 1)))
    assert loss == 0.0 and grad.abs().max() < 1e-15  # what 64 points add cancels, but for rounding


@pytest.mark.parametrize("size", SIZES)
def test_obeys_single_precision_rule(size: tuple[int, int, int]) -> None:
    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        normals = _normals(size, dtype)
        return _twin(normals) if backend == "reference" else _kernel(normals)

    assert_single_precision_rule(run)


def test_only_the_taps_first_two_components_get_a_gradient() -> None:
    grad = convexity_bwd(_normals((1, 64, 64)), torch.ones((), dtype=F64, device=DEVICE))
    assert grad[..., 2].count_nonzero() == 0
    touched = grad[..., :2].ne(0).any(dim=-1)[0]
    taps = torch.tensor([8 * i + k for i in range(8) for k in (3, 4)], device=DEVICE)
    expected = torch.zeros(64, dtype=torch.bool, device=DEVICE)
    expected[taps] = True
    assert torch.equal(touched, expected[:, None] & expected[None, :])


def test_strided_normals() -> None:
    normals = _normals((2, 9, 12))
    strided = torch.stack([normals, normals], dim=-1)[..., 1]
    assert not strided.is_contiguous()
    for a, b in zip(_kernel(strided), _kernel(normals), strict=True):
        assert torch.equal(a, b)


def test_nan_is_not_hidden() -> None:
    normals = _normals((1, 64, 64))
    normals[0, 3, 4, 0] = float("nan")  # a tap
    loss, grad = _kernel(normals)
    assert loss.isnan() and grad.isnan().any()


def test_same_bits_twice() -> None:
    normals = _normals((2, 13, 11), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(_kernel(normals), _kernel(normals), strict=True))


def test_the_op_reaches_it_by_name() -> None:
    leaf = _normals((2, 9, 12)).requires_grad_()
    loss = convexity_op(leaf, backend="triton")
    ours = [loss.detach(), torch.autograd.grad(loss * GRAD, leaf)[0]]
    assert all(torch.equal(a, b) for a, b in zip(ours, _kernel(leaf.detach()), strict=True))
    torch.library.opcheck(_triton_forward, (_normals((1, 9, 9)).requires_grad_(),))


@pytest.mark.gpu
def test_a_graph_captures_it() -> None:
    normals = _normals((2, 64, 64), torch.float32)
    grad = normals.new_tensor(GRAD)
    _kernel(normals)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = [convexity_fwd(normals), convexity_bwd(normals, grad)]
    normals.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(ours, _kernel(normals), strict=True))
