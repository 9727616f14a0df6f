"""Hash grid, MLPs, blob and closed-form normals (the PyTorch twin), and the modules above them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import random_field, relative_error
from torch import Tensor

from sdi_fast.config import FieldConfig
from sdi_fast.constants import HASH_PRIMES
from sdi_fast.field import EnvironmentBackground, NeRFField
from sdi_fast.reference import background, density, field, hash_encode
from sdi_fast.reference.background import spherical_harmonics
from sdi_fast.reference.hash_encode import hash_encode_with_jacobian
from sdi_fast.types import FieldParams, FieldSpec, HashGridSpec, SDIFastError

# f64 against f64, two orders of summation: a few hundred roundings of 1e-16
F64_TOLERANCE = 1e-11


def random_points(n: int, *, bound: float = 2.0, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, generator=generator, dtype=torch.float64) * 2 - 1) * bound


def encode_by_hand(point: list[float], table: Tensor, spec: HashGridSpec) -> list[float]:
    """methods.md D written with Python's integers, one point and one corner at a time."""
    features = []
    for level in range(spec.n_levels):
        res, size, offset = (
            spec.resolutions[level],
            spec.level_sizes[level],
            spec.level_offsets[level],
        )
        position = [u * spec.scales[level] + 0.5 for u in point]
        low = [math.floor(p) for p in position]
        sums = [0.0] * spec.n_features
        for dx, dy, dz in [(i & 1, i >> 1 & 1, i >> 2) for i in range(8)]:
            corner = [low[0] + dx, low[1] + dy, low[2] + dz]
            if res**3 <= size:
                index = corner[0] + corner[1] * res + corner[2] * res**2
            else:
                index = 0
                for c, prime in zip(corner, HASH_PRIMES, strict=True):
                    index ^= c * prime % 2**32
            weight = 1.0
            for p, f, d in zip(position, low, (dx, dy, dz), strict=True):
                weight *= p - f if d else 1 - (p - f)
            for f in range(spec.n_features):
                entry = (offset + index % size) * spec.n_features + f
                sums[f] += weight * table[entry].item()
        features += sums
    return features


def test_hash_encode_follows_the_layout(small_spec: FieldSpec) -> None:
    spec = small_spec.grid
    assert set(spec.level_is_dense) == {True, False}  # both kinds are under test
    table = random_field(small_spec, dtype=torch.float64).table
    faces = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0.5], [0.3, 1, 0]], dtype=torch.float64)
    x = torch.cat([random_points(20, bound=0.5) + 0.5, faces])
    expected = torch.tensor(
        [encode_by_hand(p, table, spec) for p in x.tolist()], dtype=torch.float64
    )
    assert relative_error(hash_encode(x, table, spec, spec.n_levels), expected) < F64_TOLERANCE


def test_hash_encode_with_other_feature_counts() -> None:
    for n_features in (1, 4):
        spec = HashGridSpec(3, n_features, 6, 3, 2.0)
        table = torch.randn(spec.n_params, dtype=torch.float64)
        x = random_points(7, bound=0.5) + 0.5
        expected = torch.tensor(
            [encode_by_hand(p, table, spec) for p in x.tolist()], dtype=torch.float64
        )
        assert relative_error(hash_encode(x, table, spec, 3), expected) < F64_TOLERANCE


def test_full_size_grid_matches_the_official_counts() -> None:
    """The numbers that methods.md D gives for the official configuration."""
    spec = HashGridSpec()
    assert spec.n_params == 12_599_920
    assert spec.resolutions == (
        16, 24, 34, 49, 71, 102, 148, 213, 308, 446, 646, 934, 1352, 1956, 2831, 4096,
    )  # fmt: skip


def test_masked_levels_are_zero_and_get_no_gradient(small_spec: FieldSpec) -> None:
    spec = small_spec.grid
    table = random_field(small_spec, dtype=torch.float64).table.requires_grad_()
    x = random_points(50, bound=0.5) + 0.5
    full = hash_encode(x, table, spec, spec.n_levels)
    for active in range(spec.n_levels + 1):
        part = hash_encode(x, table, spec, active)
        n = active * spec.n_features
        assert torch.equal(part[:, :n], full[:, :n])
        assert not part[:, n:].any()
        if active:
            (grad,) = torch.autograd.grad(part.sum(), table)
            first_masked = spec.level_offsets[active] * spec.n_features
            assert grad[:first_masked].any()
            assert not grad[first_masked:].any()


def test_jacobian_is_the_derivative_by_x(small_spec: FieldSpec) -> None:
    spec = small_spec.grid
    table = random_field(small_spec, dtype=torch.float64).table
    x = (random_points(40, bound=0.5) + 0.5).requires_grad_()
    features, jacobian = hash_encode_with_jacobian(x.detach(), table, spec, 3)
    assert torch.equal(features, hash_encode(x.detach(), table, spec, 3))
    cotangent = torch.randn_like(features)
    (expected,) = torch.autograd.grad(hash_encode(x, table, spec, 3), x, cotangent)
    actual = torch.einsum("nf,nfd->nd", cotangent, jacobian)
    assert relative_error(actual, expected) < F64_TOLERANCE


def test_hash_encode_gradcheck() -> None:
    spec = HashGridSpec(2, 2, 5, 3, 1.9)
    table = torch.randn(spec.n_params, dtype=torch.float64, requires_grad=True)
    # off the cells' borders, which the finite differences' step of 1e-6 must not cross
    x = (torch.rand(6, 3, dtype=torch.float64).round(decimals=2) * 0.8 + 0.1013).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: hash_encode(x, t, spec, 2), (x, table))


def test_all_levels_masked_leaves_the_blob(
    small_spec: FieldSpec, small_params: FieldParams
) -> None:
    x = random_points(10)
    _, albedo, normal = field(x, small_params, small_spec, 0)
    assert torch.equal(albedo, torch.full_like(albedo, 0.5))
    assert relative_error(normal, x / x.norm(dim=-1, keepdim=True)) < F64_TOLERANCE


@pytest.mark.parametrize("active", [2, 4])
def test_closed_form_normal_equals_autograd(
    small_spec: FieldSpec, small_params: FieldParams, active: int
) -> None:
    """Values and parameter gradients, the normal's second-order part included.

    The other way is the official one: normalize(-d density / dx) with create_graph.
    """
    x = random_points(300, bound=1.2).requires_grad_()
    sigma = density(x, small_params, small_spec, active)
    (slope,) = torch.autograd.grad(sigma.sum(), x, create_graph=True)
    by_autograd = -torch.nn.functional.normalize(slope, dim=-1)
    sigma_field, _, normal = field(x, small_params, small_spec, active)
    # softplus' scales the slope down to 1e-9 at the rim; eps of the norm is 1e-12
    assert relative_error(normal, by_autograd) < 1e-9
    assert torch.equal(sigma_field, sigma)

    cotangent = torch.randn_like(normal)
    names = ("table", "density_w1", "density_w2")
    leaves = [getattr(small_params, name) for name in names]
    expected = torch.autograd.grad((by_autograd * cotangent).sum(), leaves)
    actual = torch.autograd.grad((normal * cotangent).sum(), leaves)
    for name, a, e in zip(names, actual, expected, strict=True):
        assert e.abs().max() > 0
        assert relative_error(a, e) < 1e-8, name


def test_field_gradcheck(small_params: FieldParams) -> None:
    """Every output by every parameter, against finite differences in f64."""
    spec = FieldSpec(HashGridSpec(2, 2, 5, 3, 1.9), hidden=3)
    leaves = random_field(spec, dtype=torch.float64, seed=3).tensors()
    for tensor in leaves:
        tensor.requires_grad_()
    x = random_points(5, bound=0.8)
    assert torch.autograd.gradcheck(lambda *p: field(x, FieldParams(*p), spec, 2), leaves)


def test_blob_alone_is_a_sphere(small_spec: FieldSpec) -> None:
    """With zero weights density is softplus(10 (1 - |x| / 0.5)) and normals point outwards."""
    params = FieldParams(
        *(torch.zeros_like(t) for t in random_field(small_spec, dtype=torch.float64).tensors())
    )
    x = random_points(100)
    sigma, albedo, normal = field(x, params, small_spec, 4)
    radius = x.norm(dim=-1, keepdim=True)
    expected = torch.log1p(torch.exp(10 * (1 - radius / 0.5)))[:, 0]
    assert relative_error(sigma, expected) < F64_TOLERANCE
    assert torch.equal(albedo, torch.full_like(albedo, 0.5))
    assert relative_error(normal, x / radius) < F64_TOLERANCE


def test_centre_of_the_blob_is_finite(small_spec: FieldSpec, small_params: FieldParams) -> None:
    outputs = field(torch.zeros(1, 3, dtype=torch.float64), small_params, small_spec, 4)
    sum(o.sum() for o in outputs).backward()
    for value in (*outputs, *(t.grad for t in small_params.tensors())):
        assert value.isfinite().all()


def test_no_points_and_no_gradient_to_x(small_spec: FieldSpec, small_params: FieldParams) -> None:
    empty = torch.zeros(0, 3, dtype=torch.float64)
    sigma, albedo, normal = field(empty, small_params, small_spec, 4)
    assert (sigma.shape, albedo.shape, normal.shape) == ((0,), (0, 3), (0, 3))
    (sigma.sum() + albedo.sum() + normal.sum()).backward()
    assert not small_params.table.grad.any()

    x = random_points(5).requires_grad_()
    sum(o.sum() for o in field(x, small_params, small_spec, 4)).backward()
    assert x.grad is None


def test_f32_agrees_with_f64(small_spec: FieldSpec) -> None:
    x = random_points(200, bound=1.0)
    double = field(x, random_field(small_spec, dtype=torch.float64), small_spec, 4)
    single = field(x.float(), random_field(small_spec), small_spec, 4)
    for s, d in zip(single, double, strict=True):
        # the normal jumps where a ReLU's argument is about 0: a handful of points at most
        assert relative_error(s, d) < 1e-3
        assert (s.double() - d).abs().median() < 1e-6


def test_spherical_harmonics_are_orthonormal() -> None:
    """Their Gram matrix over the sphere, by Gauss-Legendre x trapezoid (exact for degree 4)."""
    n_ring = 8
    heights = torch.tensor(
        [0.0, 0.538469310105683, -0.538469310105683, 0.906179845938664, -0.906179845938664],
        dtype=torch.float64,
    )
    share = torch.tensor(
        [0.568888888888889, 0.478628670499366, 0.478628670499366]
        + [0.236926885056189, 0.236926885056189],
        dtype=torch.float64,
    )
    phi = torch.arange(n_ring, dtype=torch.float64) * (2 * math.pi / n_ring)
    z, angle = torch.meshgrid(heights, phi, indexing="ij")
    level = (1 - z * z).sqrt()
    directions = torch.stack([level * angle.cos(), level * angle.sin(), z], dim=-1).view(-1, 3)
    weights = (share[:, None] * (2 * math.pi / n_ring)).expand_as(z).reshape(-1)
    sh = spherical_harmonics(directions)
    gram = torch.einsum("n,ni,nj->ij", weights, sh, sh)
    assert torch.allclose(gram, torch.eye(9, dtype=torch.float64), atol=1e-12)


def test_background_gradcheck() -> None:
    directions = torch.nn.functional.normalize(random_points(6), dim=-1)
    weights = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((16, 9), (16, 16), (3, 16))
    ]
    assert torch.autograd.gradcheck(lambda *w: background(directions, *w), weights)


def test_nerf_field_initialisation_and_schedule() -> None:
    config = FieldConfig(log2_hashmap_size=10)
    nerf = NeRFField(config, generator=torch.Generator().manual_seed(3))
    same = NeRFField(config, generator=torch.Generator().manual_seed(3))
    other = NeRFField(config, generator=torch.Generator().manual_seed(4))
    for name, value in nerf.named_parameters():
        assert torch.equal(value, same.get_parameter(name))
        assert not torch.equal(value, other.get_parameter(name))
        bound = 1e-4 if name == "table" else value.shape[1] ** -0.5
        assert value.abs().max() <= bound
        if value.numel() > 100:  # enough draws for the bound to be nearly reached
            assert value.abs().max() > 0.9 * bound
    assert [nerf.active_levels(s) for s in (0, 2000, 2499, 2500, 5999, 6000, 99_999)] == [
        8, 8, 8, 9, 15, 16, 16,
    ]  # fmt: skip


def test_nerf_field_calls_the_twins(small_spec: FieldSpec) -> None:
    g = small_spec.grid
    config = FieldConfig(
        g.n_levels, g.n_features, g.log2_hashmap_size, g.base_resolution, g.per_level_scale,
        start_level=2, start_step=10, update_steps=5, hidden=small_spec.hidden,
    )  # fmt: skip
    nerf = NeRFField(config, backend="reference")
    assert nerf.spec == small_spec
    x = random_points(10).float()
    for step, active in ((0, 2), (15, 3)):
        expected = field(x, nerf.params(), nerf.spec, active)
        for a, e in zip(nerf(x, step), expected, strict=True):
            assert torch.equal(a, e)
        sigma = nerf.density(x, step)
        assert not sigma.requires_grad
        assert torch.allclose(sigma, expected[0], rtol=1e-5)


def test_environment_background_has_three_layers() -> None:
    sky = EnvironmentBackground(generator=torch.Generator().manual_seed(0), backend="reference")
    assert {k: tuple(v.shape) for k, v in sky.named_parameters()} == {
        "w1": (16, 9),
        "w2": (16, 16),
        "w3": (3, 16),
    }
    colour = sky(torch.nn.functional.normalize(random_points(20).float(), dim=-1))
    assert colour.shape == (20, 3)
    assert (colour > 0).all() and (colour < 1).all() and colour.std() > 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"n_levels": 0}, "field.n_levels"),
        ({"hidden": 0}, "field.hidden"),
        ({"radius": 0.0}, "field.radius"),
        ({"radius": float("nan")}, "field.radius"),
        ({"start_level": -1}, "field.start_level"),
    ],
)
def test_bad_settings_are_named(change: dict[str, float], name: str) -> None:
    config = dataclasses.replace(FieldConfig(log2_hashmap_size=8), **change)
    with pytest.raises(SDIFastError, match=name):
        NeRFField(config)
