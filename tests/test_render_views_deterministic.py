"""The fused renderer's gradients that repeat bit by bit (csrc/cuda/render_bwd_fixed.h).

That they agree with the twin is in test_render_views.py. What only a GPU can show is here too: two
runs beside other work.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import random_field, relative_error
from fused_cases import DEVICE, EMULATED, ON_GPU, fused, needs_kernels, repeating
from test_render_views import SUMS, Scene, make_camera, make_scene, random_cotangents
from torch import Tensor

from sdi_fast.ops import _native
from sdi_fast.types import Camera, FieldSpec, HashGridSpec


def many_tiles() -> tuple[Scene, Camera]:
    """More than the emulated GPU has warps, so that some take two; samples far apart."""
    scene = make_scene("random")
    scene.marching = dataclasses.replace(scene.marching, step_size=0.3)
    return scene, make_camera(2, 22, 23)


@pytest.mark.skipif(not EMULATED, reason="needs an order of blocks and warps to choose")
def test_no_bit_depends_on_the_order_of_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, camera = many_tiles()

    def grads(function: Any, order: str) -> list[Tensor]:
        monkeypatch.setenv("SDI_EMULATE_ORDER", order)
        return scene.run(
            function, camera, "diffuse", torch.float32, None, random_cotangents(camera)
        )[1]

    for a, b in zip(grads(repeating, "forward"), grads(repeating, "reverse"), strict=True):
        assert a.any() and torch.equal(a, b)
    in_order, reversed_ = grads(fused, "forward"), grads(fused, "reverse")
    assert not torch.equal(in_order[0], reversed_[0])  # or the order makes no difference to anyone


@needs_kernels
def test_cotangents_of_any_size_are_summed_in_fixed_point() -> None:
    """The unit follows them."""
    scene, camera = make_scene("random"), make_camera(1, 9, 11)
    cotangents = random_cotangents(camera)

    def grads(factor: float) -> list[Tensor]:
        return scene.run(
            repeating, camera, "diffuse", torch.float32, None, cotangents, grad_scale=factor
        )[1]

    plain = grads(1.0)
    for factor in (2.0**-40, 2.0**40):
        for a, b in zip(grads(factor), plain, strict=True):
            assert relative_error(a, b) < 1e-6  # the smallest leave f16's range, or come back


def active(scene: Scene, table: Tensor) -> Tensor:
    return table[: 2 * scene.spec.grid.level_offsets[scene.active_levels]]


@needs_kernels
def test_zeros_and_an_empty_grid_give_zeros() -> None:
    scene, camera = make_scene("random"), make_camera(1, 9, 11)
    some = random_cotangents(camera)
    none = [torch.zeros_like(c) for c in some]
    empty = dataclasses.replace(scene, occupancy=torch.zeros_like(scene.occupancy))
    for given, cotangents in ((scene, none), (empty, some)):
        _, grads = given.run(repeating, camera, "diffuse", torch.float32, None, cotangents)
        assert all(not g.any() for g in grads)


@needs_kernels
@pytest.mark.parametrize("seed", [0, 1])
def test_sums_do_not_overflow_where_all_samples_meet(seed: int) -> None:
    """A table of 8 entries a level, on which samples of equal sign pile up."""
    camera = make_camera(1, 12, 14, seed)
    grid = HashGridSpec(4, 2, 3, 2, 1.0)
    spec = FieldSpec(grid, blob_scale=4.0)
    params = random_field(spec, table_std=0.02, seed=seed)
    steady = dataclasses.replace(params, density_w1=params.density_w1.abs(),
                                 density_w2=params.density_w2.abs(),
                                 table=params.table.abs() + 0.3)  # fmt: skip
    scene = dataclasses.replace(make_scene("random"), spec=spec, params=steady, active_levels=4)
    cotangents = [torch.zeros_like(c) for c in random_cotangents(camera)]
    cotangents[SUMS.index("opacity")].fill_(1.0)
    _, (ours, *_) = scene.run(repeating, camera, "albedo", torch.float32, None, cotangents)
    _, (expected, *_) = scene.run(fused, camera, "albedo", torch.float32, None, cotangents)
    assert relative_error(ours, expected) < 2e-6


@needs_kernels
def test_small_gradients_survive_beside_large_ones() -> None:
    """render_bwd_fixed.h: of some thousand samples 2^-30 of the mean is more than f16 resolves."""
    scene, camera = make_scene("random"), make_camera(2, 9, 11)
    n = 9 * 11
    near = random_cotangents(camera)
    for c in near:
        c[n:] = 0.0
    far = [c * 2.0**-30 for c in random_cotangents(camera)]
    for c in far:
        c[:n] = 0.0
    both = [a + b for a, b in zip(near, far, strict=True)]
    tables = [
        scene.run(repeating, camera, "diffuse", torch.float32, None, c)[1][0]
        for c in (near, far, both)
    ]
    alone = (tables[0] == 0) & (tables[1] != 0)
    assert alone.sum() > 100
    assert relative_error(tables[2][alone], tables[1][alone]) < 2.0**-11


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SUMS)
def test_what_is_not_finite_reaches_gradients_that_repeat(name: str, value: float) -> None:
    """So that the engine skips the step."""
    scene, camera = make_scene("random"), make_camera(1, 9, 11)
    cotangents = random_cotangents(camera)
    cotangents[SUMS.index(name)][5 * 11 + 5] = value
    grads = scene.run(repeating, camera, "diffuse", torch.float32, None, cotangents)[1]
    assert active(scene, grads[0]).isnan().all()
    assert not all(g.isfinite().all() for g in grads[1:])


@needs_kernels
@pytest.mark.parametrize("exponent", [110, 118, 122, 126])
def test_what_is_too_large_for_fixed_point_is_nan(exponent: int) -> None:
    scene, camera = make_scene("random"), make_camera(1, 9, 11)
    cotangents = [c * 2.0 ** (exponent - 2) for c in random_cotangents(camera)]
    _, (table, *_) = scene.run(repeating, camera, "diffuse", torch.float32, None, cotangents)
    _, (expected, *_) = scene.run(fused, camera, "diffuse", torch.float32, None, cotangents)
    if exponent < 120:
        assert relative_error(table, expected) < 2e-6
    else:
        assert active(scene, table).isnan().all()


@pytest.mark.skipif(not (ON_GPU and _native.has_cuda()), reason="needs a CUDA device")
@pytest.mark.gpu
def test_runs_on_a_busy_gpu_repeat_every_bit() -> None:
    """Large enough to fill it; while another stream computes, warps come in another order."""
    scene, camera = make_scene("random"), make_camera(4, 128, 125)
    cotangents = random_cotangents(camera)

    def grads(function: Any) -> list[Tensor]:
        return scene.run(function, camera, "diffuse", torch.float32, None, cotangents)[1]

    first, plain = grads(repeating), grads(fused)
    side = torch.cuda.Stream()
    noise = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(3):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(20):
                noise @ noise
        second = grads(repeating)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            third = grads(repeating)
        torch.cuda.current_stream().wait_stream(side)
        for a, b, c, d in zip(first, second, third, plain, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
            assert relative_error(a, d) < 1e-5  # atomics: another order of additions
