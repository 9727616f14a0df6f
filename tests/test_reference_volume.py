"""Marching, pruning, compositing and shading: the PyTorch twins against analysis and loops."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from torch import Tensor

from sdi_fast.reference import composite, march, prune, shade
from sdi_fast.types import Samples, SDIFastError

# ---- marching -------------------------------------------------------------------------------


def march_by_hand(
    origins: Tensor, directions: Tensor, occupancy: Tensor, dt: float, t0: Tensor
) -> list[tuple[int, int]]:
    """(ray, step) of every sample, one at a time."""
    g, found = len(occupancy), []
    for ray in range(len(origins)):
        for k in range(int(12 / dt)):
            middle = origins[ray] + directions[ray] * (t0[ray] + (k + 0.5) * dt)
            cell = ((middle + 2.0) / 4.0 * g).floor().long().tolist()
            if min(cell) >= 0 and max(cell) < g and occupancy[tuple(cell)]:
                found.append((ray, k))
    return found


@pytest.mark.parametrize("chunk", [1 << 21, 100])
@pytest.mark.parametrize("near", [0.0, 0.7])
def test_march_by_hand(monkeypatch: pytest.MonkeyPatch, near: float, chunk: int) -> None:
    # by name: the package exports the function, which hides the module
    module = importlib.import_module("sdi_fast.reference.march")
    monkeypatch.setattr(module, "_CHUNK_SAMPLES", chunk)
    n = 40
    origins = torch.randn(n, 3, dtype=torch.float64) * 1.5  # inside and outside the box
    directions = torch.nn.functional.normalize(
        torch.randn(n, 3, dtype=torch.float64) - 0.5 * origins, dim=-1
    )
    directions[:3] = torch.eye(3, dtype=torch.float64)  # along the axes
    origins[3] = 50.0  # misses the box
    jitter = torch.rand(n, dtype=torch.float64) * 0.11
    occupancy = torch.rand(6, 6, 6) < 0.4
    samples = march(origins, directions, occupancy, 2.0, 0.11, near, jitter)
    expected = march_by_hand(origins, directions, occupancy, 0.11, near + jitter)
    assert len(expected) > 100
    rays = torch.tensor([ray for ray, _ in expected])
    steps = torch.tensor([k for _, k in expected])
    assert torch.equal(samples.ray_indices, rays)
    start = near + jitter[rays] + steps * 0.11
    assert torch.allclose(samples.t_starts, start, atol=1e-12)
    assert torch.allclose(samples.t_ends, start + 0.11, atol=1e-12)
    assert_packed(samples, n)


def assert_packed(samples: Samples, n_rays: int) -> None:
    first, count = samples.packed_info.unbind(-1)
    assert samples.packed_info.shape == (n_rays, 2)
    assert torch.equal(torch.repeat_interleave(torch.arange(n_rays), count), samples.ray_indices)
    assert torch.equal(first, count.cumsum(0) - count)


def test_march_of_nothing() -> None:
    directions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    for origins, grid in (
        (torch.zeros(2, 3), torch.zeros(4, 4, 4, dtype=torch.bool)),  # empty
        (torch.full((2, 3), 9.0), torch.ones(4, 4, 4, dtype=torch.bool)),  # outside
    ):
        samples = march(origins, directions, grid, 2.0, 0.1, 0.0, None)
        assert samples.n_samples == 0
        assert_packed(samples, 2)
    nothing = march(torch.zeros(0, 3), torch.zeros(0, 3), grid, 2.0, 0.1, 0.0, None)
    assert nothing.packed_info.shape == (0, 2)


def test_full_grid_covers_the_way_through_the_box() -> None:
    samples = march(
        torch.tensor([[-1.0, 0.0, 0.0], [5.0, 0.1, 0.0]]),
        torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]),
        torch.ones(3, 3, 3, dtype=torch.bool),
        2.0,
        0.01,
        0.0,
        None,
    )
    assert samples.packed_info[:, 1].tolist() == [300, 400]  # 3 units, and 4
    assert samples.t_starts[300].item() == pytest.approx(3.0, abs=0.01)


# ---- pruning and compositing ----------------------------------------------------------------


def random_samples(counts: list[int], dt: float = 0.05) -> Samples:
    """Consecutive steps, counts[r] of them on ray r."""
    count = torch.tensor(counts)
    ray = torch.repeat_interleave(torch.arange(len(counts)), count)
    first = count.cumsum(0) - count
    k = (torch.arange(len(ray)) - first[ray]).double()
    return Samples(ray, 0.5 + k * dt, 0.5 + (k + 1) * dt, torch.stack([first, count], dim=-1))


def test_prune_by_hand() -> None:
    samples = random_samples([30, 0, 50, 1])
    density = torch.rand(81, dtype=torch.float64) * 12
    kept = []
    for ray in range(4):
        first, count = samples.packed_info[ray].tolist()
        transmittance = 1.0
        for i in range(first, first + count):
            alpha = 1 - math.exp(-density[i].item() * 0.05)
            if transmittance >= 0.01 and alpha >= 0.2:
                kept.append(i)
            transmittance *= 1 - alpha
    pruned = prune(samples, density, 0.01, 0.2)
    assert 5 < len(kept) < 60
    assert torch.equal(pruned.ray_indices, samples.ray_indices[kept])
    assert torch.equal(pruned.t_starts, samples.t_starts[kept])
    assert torch.equal(pruned.t_ends, samples.t_ends[kept])
    assert_packed(pruned, 4)


def test_composite_of_a_uniform_slab() -> None:
    """Opacity 1 - exp(-sigma L); depth and variance those of an exponential law on the slab."""
    n, dt, sigma = 2000, 0.001, 1.5
    samples = random_samples([n, 0], dt)
    colour = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64).expand(n, 3)
    normal = torch.tensor([0.0, 0.6, 0.8], dtype=torch.float64).expand(n, 3)
    directions = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    out = composite(torch.full((n,), sigma).double(), colour, normal, samples, directions)
    length = n * dt
    opacity = 1 - math.exp(-sigma * length)
    assert out.opacity.tolist() == pytest.approx([opacity, 0.0], rel=1e-12)
    assert out.weights.sum().item() == pytest.approx(opacity, rel=1e-12)
    assert torch.allclose(out.rgb[0], opacity * colour[0])
    assert torch.allclose(out.normal_sum[0], opacity * normal[0])
    assert out.orient[0].item() == pytest.approx(opacity * 0.64, rel=1e-12)
    # moments of sigma exp(-sigma s) on [0, length]; the midpoint rule errs by dt^2
    mass_1 = (1 - (1 + sigma * length) * math.exp(-sigma * length)) / sigma
    mass_2 = 2 / sigma * mass_1 - length**2 * math.exp(-sigma * length)
    assert out.depth[0].item() == pytest.approx(0.5 * opacity + mass_1, rel=1e-5)
    variance = mass_2 / opacity - (mass_1 / opacity) ** 2
    assert out.z_variance[0].item() == pytest.approx(variance, rel=1e-5)
    for value in (out.rgb, out.depth, out.normal_sum, out.z_variance, out.orient):
        assert not value[1].any()  # the ray without samples


def test_z_variance_only_where_opaque() -> None:
    samples = random_samples([10, 10])
    density = torch.cat([torch.full((10,), 1.0), torch.full((10,), 3.0)]).double()
    ones = torch.ones(20, 3, dtype=torch.float64)
    out = composite(density, ones, ones, samples, ones[:2])
    assert out.opacity[0] < 0.5 < out.opacity[1]
    assert out.z_variance[0] == 0.0 and out.z_variance[1] > 0.0


def test_composite_gradcheck() -> None:
    samples = random_samples([6, 0, 9])
    density = torch.rand(15, dtype=torch.float64) * 8 + 0.5
    rgb = torch.rand(15, 3, dtype=torch.float64)
    normal = torch.nn.functional.normalize(torch.randn(15, 3, dtype=torch.float64), dim=-1)
    directions = torch.nn.functional.normalize(torch.randn(3, 3, dtype=torch.float64), dim=-1)

    def outputs(density: Tensor, rgb: Tensor, normal: Tensor) -> tuple[Tensor, ...]:
        out = composite(density, rgb, normal, samples, directions)
        return out.rgb, out.opacity, out.depth, out.normal_sum, out.z_variance

    for value in (density, rgb, normal):
        value.requires_grad_()
    assert torch.autograd.gradcheck(outputs, (density, rgb, normal))
    out = composite(density, rgb, normal, samples, directions)
    assert not out.weights.requires_grad
    by_density, by_normal = torch.autograd.grad(
        out.orient.sum(), (density, normal), allow_unused=True
    )
    assert by_density is None  # the weights are detached there
    ray = samples.ray_indices
    facing = (normal * directions[ray]).sum(-1, keepdim=True).clamp_min(0)
    assert torch.allclose(by_normal, 2 * out.weights[:, None] * facing * directions[ray])


def test_many_rays_in_f32_keep_their_precision() -> None:
    """A running sum over 2 million samples must not leak from ray to ray."""
    n_rays, count = 20_000, 100
    samples = random_samples([count] * n_rays)
    samples = dataclasses.replace(
        samples, t_starts=samples.t_starts.float(), t_ends=samples.t_ends.float()
    )
    density = torch.full((n_rays * count,), 2.0)
    ones = torch.ones(1, 3)
    out = composite(
        density,
        ones.expand(n_rays * count, 3),
        ones.expand(n_rays * count, 3),
        samples,
        ones.expand(n_rays, 3),
    )
    # 100 fp32 additions
    assert torch.allclose(out.opacity, torch.tensor(1 - math.exp(-10.0)), atol=1e-5)


# ---- shading --------------------------------------------------------------------------------


def test_shading_by_hand() -> None:
    albedo = torch.tensor([[0.2, 0.4, 0.6]]).expand(4, 3)
    x = torch.zeros(4, 3)
    lights = torch.tensor([[0.0, 0.0, 3.0], [2.0, 0.0, 0.0]])
    view = torch.tensor([0, 0, 0, 1])
    normal = torch.tensor([[0.0, 0, 1], [0, 0, -1], [0, 0.8, 0.6], [0, 0, 1]])
    light = torch.tensor([1.0, 0.1, 0.1 + 0.9 * 0.6, 0.1])[:, None]
    assert torch.equal(shade(albedo, normal, x, lights, view, "albedo"), albedo)
    assert torch.allclose(shade(albedo, normal, x, lights, view, "textureless"), light.expand(4, 3))
    assert torch.allclose(shade(albedo, normal, x, lights, view, "diffuse"), albedo * light)
    with pytest.raises(SDIFastError, match="shading.*'shiny'"):
        shade(albedo, normal, x, lights, view, "shiny")
