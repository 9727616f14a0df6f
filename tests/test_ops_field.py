"""The field's and the hash encoding's C++ kernels: gradcheck, parity with the twins, precision."""

from __future__ import annotations

import pytest
import torch
from conftest import random_field
from ops_cases import (
    F64,
    F64_TOLERANCE,
    SPECS,
    assert_single_precision_rule,
    field_inputs,
    outputs_and_grads,
    rand,
    randn,
    worst_error,
)
from torch import Tensor

from sdi_fast.ops.field import density, field
from sdi_fast.ops.hash_encode import hash_encode
from sdi_fast.types import FieldParams, FieldSpec, HashGridSpec

TINY = FieldSpec(HashGridSpec(2, 2, 5, 3, 1.6), hidden=4)  # level 0 dense, level 1 hashed


def _field(spec: FieldSpec, active: int, dtype: torch.dtype, backend: str, n: int = 333):
    x, params = field_inputs(spec, n, active, dtype)
    return outputs_and_grads(
        lambda: field(x, params, spec, active, backend=backend), params.tensors()
    )


def test_field_gradcheck() -> None:
    # all five parameters through density, albedo and normal: the last is second order in the field
    x, params = field_inputs(TINY, 5, 2)
    assert torch.autograd.gradcheck(
        lambda *p: field(x, FieldParams(*p), TINY, 2, backend="cpu"),
        params.tensors(),
        eps=1e-6,
        atol=1e-7,  # central differences: 1e-16 / 1e-6 rounding, 1e-12 truncation, outputs of 10
        rtol=1e-6,
    )


def test_normal_gradcheck_alone() -> None:
    x, params = field_inputs(TINY, 4, 2, seed=3)
    assert torch.autograd.gradcheck(
        lambda *p: field(x, FieldParams(*p), TINY, 2, backend="cpu")[2],
        params.tensors(),
        eps=1e-6,
        atol=1e-7,
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", SPECS)
def test_field_matches_twin_in_f64(name: str) -> None:
    spec = SPECS[name]
    for active in (spec.grid.n_levels, spec.grid.n_levels - 1, 1):
        ours, our_grads = _field(spec, active, F64, "cpu")
        twin, twin_grads = _field(spec, active, F64, "reference")
        assert worst_error(ours, twin) < F64_TOLERANCE
        assert worst_error(our_grads, twin_grads) < F64_TOLERANCE
        assert all(g.abs().sum() > 0 for g in our_grads)


def test_normal_alone_matches_twin() -> None:
    # only the normal's cotangent: nothing first-order can hide an error of the second-order part
    spec = SPECS["official_shape"]
    grads = []
    for backend in ("cpu", "reference"):
        x, params = field_inputs(spec, 200, 6)
        normal = field(x, params, spec, 6, backend=backend)[2]
        trained = (params.table, params.density_w1, params.density_w2)
        grads.append(torch.autograd.grad(normal, trained, randn(200, 3, seed=9)))
    assert worst_error(*grads) < F64_TOLERANCE


def test_field_obeys_single_precision_rule() -> None:
    spec = SPECS["official_shape"]

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        outputs, grads = _field(spec, 6, dtype, backend, n=2000)
        return outputs + grads

    assert_single_precision_rule(run)


def test_masked_levels_get_no_gradient() -> None:
    spec = SPECS["official_shape"]
    _, grads = _field(spec, 3, F64, "cpu")
    first = spec.grid.level_offsets[3] * spec.grid.n_features
    assert grads[0][:first].abs().sum() > 0
    assert torch.count_nonzero(grads[0][first:]) == 0
    assert torch.count_nonzero(grads[1][:, 3 * spec.grid.n_features :]) == 0


def test_density_matches_field_and_has_no_gradient() -> None:
    spec = SPECS["official_shape"]
    for dtype, tolerance in ((F64, 1e-15), (torch.float32, 1e-6)):
        x, params = field_inputs(spec, 100, 6, dtype)
        value = density(x, params, spec, 6, backend="cpu")
        assert not value.requires_grad
        assert worst_error([value], [field(x, params, spec, 6, backend="cpu")[0]]) < tolerance
        assert not density(x, params, spec, 6, backend="reference").requires_grad


def test_no_active_level_leaves_the_blob() -> None:
    spec = SPECS["official_shape"]
    x = rand(50, 3, seed=6) * 2 - 1
    params = random_field(spec, dtype=F64)
    sigma, albedo, normal = field(x, params, spec, 0, backend="cpu")
    blob = spec.blob_scale * (1 - x.norm(dim=-1) / spec.blob_std)
    torch.testing.assert_close(sigma, torch.nn.functional.softplus(blob))
    torch.testing.assert_close(albedo, torch.full_like(albedo, 0.5))
    torch.testing.assert_close(normal, x / x.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 256, 257, 4097])
def test_any_number_of_samples(n: int) -> None:
    spec = TINY
    x = (rand(max(n, 1), 3, seed=5)[:n] * 2 - 1) * spec.radius
    results = []
    for backend in ("cpu", "reference"):
        leaves = [t.requires_grad_() for t in random_field(spec, dtype=F64).tensors()]
        params = FieldParams(*leaves)
        results.append(
            outputs_and_grads(lambda b=backend, p=params: field(x, p, spec, 2, backend=b), leaves)
        )
    (ours, our_grads), (twin, twin_grads) = results
    assert worst_error(ours, twin) < F64_TOLERANCE
    assert worst_error(our_grads, twin_grads) < F64_TOLERANCE


def test_points_outside_the_box_are_safe() -> None:
    # not part of the contract (x inside), but no index may leave the table
    spec = SPECS["official_shape"]
    params = random_field(spec, dtype=torch.float32)
    bad = torch.tensor([[1e30, -1e30, 5.0], [float("nan")] * 3, [float("inf"), 0.0, 0.0]])
    x = torch.cat([bad, torch.full((2, 3), spec.radius), torch.full((2, 3), -spec.radius)])
    sigma = density(x, params, spec, 6, backend="cpu")
    twin = density(x[3:], params, spec, 6, backend="reference")
    torch.testing.assert_close(sigma[3:], twin)
    assert sigma[1].isnan()  # through the blob


def test_nan_in_parameters_shows() -> None:
    x, params = field_inputs(TINY, 20, 2, torch.float32)
    broken = params.density_w2.detach().clone()
    broken[0, 1] = float("nan")
    bad = FieldParams(params.table, params.density_w1, broken, params.color_w1, params.color_w2)
    assert field(x, bad, TINY, 2, backend="cpu")[0].isnan().any()


def test_hash_encode_gradcheck() -> None:
    x, params = field_inputs(TINY, 5, 2)
    u = ((x + TINY.radius) / (2 * TINY.radius)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, t: hash_encode(a, t, TINY.grid, 2, backend="cpu"), (u, params.table)
    )


@pytest.mark.parametrize("name", SPECS)
def test_hash_encode_matches_twin_in_f64(name: str) -> None:
    grid = SPECS[name].grid
    u = rand(501, 3, seed=2).requires_grad_()
    u.data[0], u.data[1] = 0.0, 1.0  # corners of the box: indices that wrap
    table = randn(grid.n_params, seed=1).requires_grad_()
    for active in (grid.n_levels, 2, 0):
        both = [
            outputs_and_grads(
                lambda b=b, a=active: hash_encode(u, table, grid, a, backend=b), (u, table)
            )
            for b in ("cpu", "reference")
            if active or b == "cpu"
        ]
        if active == 0:
            assert all(torch.count_nonzero(t) == 0 for part in both[0] for t in part)
            continue
        (ours, our_grads), (twin, twin_grads) = both
        assert worst_error(ours, twin) < F64_TOLERANCE
        assert worst_error(our_grads, twin_grads) < F64_TOLERANCE


def test_hash_encode_obeys_single_precision_rule() -> None:
    spec = SPECS["official_shape"]
    x, params = field_inputs(spec, 2000, 6)
    u32 = ((x + spec.radius) / (2 * spec.radius)).float()

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        u = u32.to(dtype).requires_grad_()
        table = params.table.detach().to(dtype).requires_grad_()
        outputs, grads = outputs_and_grads(
            lambda: hash_encode(u, table, spec.grid, 6, backend=backend), (u, table)
        )
        return outputs + grads

    assert_single_precision_rule(run)


def test_table_alone_without_gradient_of_x() -> None:
    grid = TINY.grid
    u, table = rand(9, 3), randn(grid.n_params).requires_grad_()
    (grad,) = torch.autograd.grad(hash_encode(u, table, grid, 2, backend="cpu").sum(), table)
    (twin,) = torch.autograd.grad(hash_encode(u, table, grid, 2, backend="reference").sum(), table)
    assert worst_error([grad], [twin]) < F64_TOLERANCE
