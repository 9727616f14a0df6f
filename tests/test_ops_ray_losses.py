"""The fused losses on rays against their twin: values, gradients, clamp edges, no rays."""

from __future__ import annotations

import pytest
import torch
from ops_cases import (
    F64,
    F64_TOLERANCE,
    assert_single_precision_rule,
    outputs_and_grads,
    rand,
    worst_error,
)
from torch import Tensor

from sdi_fast.constants import OPACITY_CLAMP
from sdi_fast.ops.ray_losses import ray_losses

SIZES = [1, 255, 257, 5000]


def _inputs(n: int, dtype: torch.dtype) -> list[Tensor]:
    """Opacity with exact zeros, ones and halves among it; the others zero where its mask is."""
    opacity = rand(n, seed=1).float()
    opacity[::5], opacity[1::7], opacity[2::11] = 0.0, 1.0, 0.5
    orient = rand(n, seed=2).float() * (opacity > 0)
    z_variance = rand(n, seed=3).float() * (opacity > 0.5)
    return [t.to(dtype).requires_grad_() for t in (opacity, orient, z_variance)]


def _run(n: int, dtype: torch.dtype, backend: str) -> list[Tensor]:
    leaves = _inputs(n, dtype)
    outputs, grads = outputs_and_grads(lambda: ray_losses(*leaves, backend=backend), leaves)
    return [*outputs[0], *grads]


# the last: more rays than the GPU's grid has threads
@pytest.mark.parametrize("n", [*SIZES, 512 * 256 + 9])
def test_matches_twin_in_f64(n: int) -> None:
    assert worst_error(_run(n, F64, "cpu"), _run(n, F64, "reference")) < F64_TOLERANCE


@pytest.mark.parametrize("n", SIZES)
def test_obeys_single_precision_rule(n: int) -> None:
    assert_single_precision_rule(lambda dtype, backend: _run(n, dtype, backend))


def test_gradcheck() -> None:
    leaves = [(rand(11, seed=i) * 0.9 + 0.05).requires_grad_() for i in range(3)]
    assert ((leaves[0] - 0.5).abs() > 1e-3).all()  # the count jumps there
    assert torch.autograd.gradcheck(lambda *x: ray_losses(*x, backend="cpu"), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_clamp_passes_gradient_at_its_edges_as_torch_does(dtype: torch.dtype) -> None:
    edges = torch.tensor([OPACITY_CLAMP, 1.0 - OPACITY_CLAMP], dtype=dtype)
    lower, upper = torch.zeros_like(edges), torch.ones_like(edges)
    points = torch.cat([edges.nextafter(lower), edges, edges.nextafter(upper)])
    grads = []
    for backend in ("cpu", "reference"):
        opacity = points.clone().requires_grad_()
        zeros = torch.zeros_like(points)
        opaque = ray_losses(opacity, zeros, zeros, backend=backend)[2]
        grads.append(torch.autograd.grad(opaque, opacity)[0])
    assert (grads[1] != 0).tolist() == [False, True, True, True, True, False]
    assert torch.equal(grads[0] != 0, grads[1] != 0)
    # two logarithms, of which f32's loses 1e-7 / 1e-3 in 1 - c
    torch.testing.assert_close(*grads, rtol=1e-12 if dtype == F64 else 1e-6, atol=0.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_volume_is_zero_and_finite(backend: str) -> None:
    leaves = [torch.zeros(300, requires_grad=True) for _ in range(3)]
    losses = ray_losses(*leaves, backend=backend)
    assert losses[0] == 0.0 and losses[3] == 0.0
    assert losses[1].item() == pytest.approx(0.1) and losses.isfinite().all()
    for grad in torch.autograd.grad(losses.sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_rays(backend: str) -> None:
    leaves = [torch.zeros(0, requires_grad=True) for _ in range(3)]
    losses = ray_losses(*leaves, backend=backend)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert losses[0] == 0.0 and losses[3] == 0.0
    assert all(g.shape == (0,) for g in torch.autograd.grad(losses.sum(), leaves))


def test_nan_shows() -> None:
    leaves = _inputs(300, torch.float32)
    for i, expected in enumerate(([1, 2], [0], [3])):
        inputs = [t.detach().clone() for t in leaves]
        inputs[i][290] = float("nan")
        assert torch.nonzero(ray_losses(*inputs, backend="cpu").isnan())[:, 0].tolist() == expected


def test_strided_images() -> None:
    leaves = _inputs(257, F64)
    strided = [torch.stack([t, t * 2], dim=-1)[:, 0] for t in leaves]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(ray_losses(*strided, backend="cpu"), ray_losses(*leaves, backend="cpu"))
