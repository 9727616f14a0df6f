"""Group norm and SiLU: the twin against autograd, Triton against the twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from ops_cases import F64, randn
from torch import Tensor

from sdi_fast.ops.group_norm_silu import group_norm_silu_bwd, group_norm_silu_fwd
from sdi_fast.types import SDIFastError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# B, P, C, G; 700 rows of 48 channels: chunks that end in the middle of a tile
SIZES = [(2, 700, 48, 8), (1, 49, 96, 8), (3, 5, 8, 2), (1, 1, 4, 1), (1, 130, 512, 32)]
EPS = 1e-6


def case(size: tuple[int, int, int, int], dtype: torch.dtype = F64) -> list[Tensor]:
    """x, shift, weight, bias, cotangent, addend; x's mean is far above its deviation."""
    b, p, c, _ = size
    x = 2.0 * randn(b, p, c, seed=1) + 20.0 + randn(1, 1, c, seed=2)
    rest = [3.0 * randn(c, seed=3), 1.0 + 0.3 * randn(c, seed=4), randn(c, seed=5)]
    last = [randn(b, p, c, seed=6), randn(b, p, c, seed=7)]
    return [v.to(dtype).to(DEVICE) for v in (x, *rest, *last)]


def run(
    inputs: list[Tensor], n_groups: int, backend: str, *, shifted=True, silu=True, adds=True
) -> list[Tensor]:
    x, shift, weight, bias, grad, addend = inputs
    s = shift if shifted else None
    y, statistics = group_norm_silu_fwd(x, s, weight, bias, n_groups, EPS, silu, backend=backend)
    grad_x = group_norm_silu_bwd(
        grad, x, s, weight, bias, statistics, addend if adds else None, silu, backend=backend
    )
    assert y.dtype == grad_x.dtype == x.dtype
    return [y, grad_x]


def by_autograd(inputs: list[Tensor], n_groups: int, *, shifted=True, silu=True, adds=True):
    x, shift, weight, bias, grad, addend = inputs
    leaf = x.clone().requires_grad_()
    h = (leaf + shift if shifted else leaf).transpose(1, 2)
    y = F.group_norm(h, n_groups, weight, bias, EPS).transpose(1, 2)
    y = F.silu(y) if silu else y
    y.backward(grad)
    return [y.detach(), leaf.grad + addend if adds else leaf.grad]


FORMS = [
    dict(shifted=s, silu=a, adds=d)
    for s, a, d in ((True, True, True), (False, False, False), (False, True, True))
]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_is_torchs_group_norm_and_its_gradient(backend, size, form):
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = case(size)
    for ours, theirs in zip(
        run(inputs, size[3], backend, **form), by_autograd(inputs, size[3], **form), strict=True
    ):
        # Triton takes eps in f32, hence as a number that is 5e-8 off
        assert relative_error(ours, theirs) < (1e-11 if backend == "reference" else 1e-9)


# bf16 on a GPU only: Triton's interpreter cuts it off instead of rounding
LOW = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", SIZES[:2])
def test_obeys_the_low_precision_rule(size, dtype):
    pytest.importorskip("triton")
    inputs = case(size, dtype)
    exact = by_autograd([v.double() for v in inputs], size[3])
    twin = run(inputs, size[3], "reference")
    for ours, plain, truth in zip(run(inputs, size[3], "triton"), twin, exact, strict=True):
        allowed = 2 * relative_error(plain, truth) + 2e-7
        assert relative_error(ours, truth) < allowed


def test_same_bits_twice():
    pytest.importorskip("triton")
    inputs = case(SIZES[0], torch.float32)
    a, b = (run(inputs, SIZES[0][3], "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_strided_vectors_and_statistics_are_read_as_they_are():
    inputs = case((2, 35, 16, 4), torch.float32)
    x, shift, weight, bias, grad, _ = inputs
    strided = [torch.stack([v, v + 7], dim=1)[:, 0] for v in (shift, weight, bias)]
    plain, statistics = group_norm_silu_fwd(x, shift, weight, bias, 4, EPS, backend="triton")
    turned, _ = group_norm_silu_fwd(x, *strided, 4, EPS, backend="triton")
    assert torch.equal(turned, plain)
    rows = statistics.transpose(1, 2).contiguous().transpose(1, 2)
    expected = group_norm_silu_bwd(grad, x, shift, weight, bias, statistics, backend="triton")
    assert torch.equal(group_norm_silu_bwd(grad, x, *strided, rows, backend="triton"), expected)


def test_statistics_of_another_batch_are_refused():
    x, shift, weight, bias, grad, _ = case((2, 35, 16, 4), torch.float32)
    _, statistics = group_norm_silu_fwd(x, shift, weight, bias, 4, EPS, backend="reference")
    for wrong in (statistics[:, :1], statistics.double(), statistics[0]):
        with pytest.raises(SDIFastError, match="statistics: expected"):
            group_norm_silu_bwd(grad, x, shift, weight, bias, wrong, backend="reference")
    with pytest.raises(SDIFastError, match="grad: expected dtype float32"):
        group_norm_silu_bwd(grad.half(), x, shift, weight, bias, statistics, backend="reference")


def test_bad_arguments_are_named():
    x, c = torch.zeros(1, 4, 6), torch.zeros(6)
    with pytest.raises(SDIFastError, match="x: expected .* divisible by 4"):
        group_norm_silu_fwd(x, None, c, c, 4, EPS)
    with pytest.raises(SDIFastError, match=r"shift: expected shape \[6\]"):
        group_norm_silu_fwd(x, torch.zeros(5), c, c, 2, EPS)
    with pytest.raises(SDIFastError, match=r"addend: expected shape \[1, 4, 6\]"):
        group_norm_silu_bwd(x, x, None, c, c, torch.zeros(2, 1, 2), torch.zeros(1, 3, 6))
