"""The benchmark scripts at tiny size, and their peer on a stand-in for nerfacc."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_field, relative_error
from small_runs import SMALL_OPTIONS
from torch import Tensor

from sdi_fast import reference
from sdi_fast.camera import orbit_cameras
from sdi_fast.config import CameraConfig, FieldConfig
from sdi_fast.reference.composite import alpha_and_transmittance
from sdi_fast.reference.march import march, pack
from sdi_fast.types import FieldSpec, HashGridSpec, MarchSpec, Samples

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_generate  # noqa: E402
import bench_render  # noqa: E402
import bench_speed  # noqa: E402
import ceilings  # noqa: E402
import harness  # noqa: E402
from peers import HalfGrid, NerfaccPeer  # noqa: E402
from render_scene import OUTPUTS, PARAMETERS  # noqa: E402

GRID = HashGridSpec(n_levels=6, log2_hashmap_size=9, base_resolution=4)
HALF_TOLERANCE = 2e-3  # products of two f16 numbers, each rounded by 2^-11 at most, rounded again


def test_half_grid_agrees_with_twin() -> None:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(GRID.n_params, generator=generator).half().float().requires_grad_()
    x = torch.rand(500, 3, generator=generator).requires_grad_()
    cotangent, direction = (torch.randn(500, n, generator=generator) for n in (12, 3))

    def results(features: Tensor) -> tuple[Tensor, ...]:
        (by_x,) = torch.autograd.grad(features, x, cotangent, create_graph=True)
        (second,) = torch.autograd.grad(by_x, table, direction, retain_graph=True)
        (first,) = torch.autograd.grad(features, table, cotangent)
        return features, by_x, first, second

    assert sum(GRID.level_is_dense) not in (0, GRID.n_levels)  # both kinds of level
    grid = HalfGrid(GRID, "cpu")
    peer = results(grid.encode(x, grid.prepare(table)))
    twin = results(reference.hash_encode(x, table, GRID, GRID.n_levels))
    for actual, expected in zip(peer, twin, strict=True):
        assert relative_error(actual, expected) < HALF_TOLERANCE


@pytest.mark.parametrize("shading", ["albedo", "diffuse"])
def test_peer_renders_as_twin(shading: str) -> None:
    spec = FieldSpec(GRID)
    params = random_field(spec, table_std=0.1)
    params = type(params)(*(p.half().float().requires_grad_() for p in params.tensors()))
    camera = orbit_cameras(CameraConfig(), 2, height=9, width=7)
    generator = torch.Generator().manual_seed(2)
    occupancy = torch.rand(8, 8, 8, generator=generator) < 0.7
    marching = MarchSpec(0.07)
    scene = (camera, params, spec, GRID.n_levels, occupancy, marching, shading)
    options: dict[str, Any] = {
        "alpha_bound": torch.tensor(2e-3),
        "jitter": torch.rand(126, generator=generator) * 0.07,
    }
    results = []
    for render in (NerfaccPeer(_stand_in(), spec, "cpu").render_views, reference.render_views):
        sums = render(*scene, **options)
        outputs = [getattr(sums, name) for name in OUTPUTS]
        generator = torch.Generator().manual_seed(4)
        cotangents = [torch.randn(o.shape, generator=generator) for o in outputs]
        grads = torch.autograd.grad(outputs, params.tensors(), cotangents)
        results.append((dict(zip((*OUTPUTS, *PARAMETERS), (*outputs, *grads), strict=True)), sums))
    (peer, peer_sums), (twin, twin_sums) = results
    assert peer_sums.counts.tolist() == twin_sums.counts.tolist()
    for name, expected in twin.items():  # derivatives take the difference of rounded features
        assert relative_error(peer[name], expected) < 10 * HALF_TOLERANCE, name


def _stand_in() -> types.SimpleNamespace:
    """What NerfaccPeer takes of nerfacc 0.5, on the CPU."""

    class Estimator(torch.nn.Module):
        binaries: Tensor
        occs: Tensor

        def __init__(self, box: Tensor, resolution: int) -> None:
            super().__init__()
            self.radius = float(box[3])

        def sampling(self, origins: Tensor, directions: Tensor, **options: Any) -> tuple[Any, ...]:
            tried = march(
                origins,
                directions,
                self.binaries[0],
                self.radius,
                options["render_step_size"],
                options["near_plane"],
                options["t_min"] - options["near_plane"],
            )
            ray, t_starts, t_ends = tried.ray_indices, tried.t_starts, tried.t_ends
            sigma = options["sigma_fn"](t_starts, t_ends, ray)
            alpha, transmittance = alpha_and_transmittance(sigma, tried)
            threshold = min(options["alpha_thre"], float(self.occs.mean()))
            keep = (transmittance >= options["early_stop_eps"]) & (alpha >= threshold)
            return ray[keep], t_starts[keep], t_ends[keep]

    def weights(
        t_starts: Tensor, t_ends: Tensor, sigma: Tensor, *, ray_indices: Tensor, n_rays: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        samples = Samples(ray_indices, t_starts, t_ends, pack(ray_indices, n_rays))
        alpha, transmittance = alpha_and_transmittance(sigma, samples)
        return alpha * transmittance, transmittance, alpha

    def accumulate(weights: Tensor, values: Tensor | None, ray: Tensor, n_rays: int) -> Tensor:
        source = weights[:, None] if values is None else weights[:, None] * values
        return source.new_zeros(n_rays, source.shape[1]).index_add(0, ray, source)

    return types.SimpleNamespace(
        OccGridEstimator=Estimator,
        render_weight_from_density=weights,
        accumulate_along_rays=accumulate,
    )


def test_bench_render_runs_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_render, "FieldConfig", lambda: FieldConfig(log2_hashmap_size=10))
    options = ["--size", "8", "--rounds", "1", "--shadings", "diffuse"]
    status = bench_render.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *options])
    assert status == 0
    content = json.loads((tmp_path / "render_cpu.json").read_text())
    assert set(content["missing"]) == {"fused", "nerfacc"}
    assert content["conditions"]["torch"] == torch.__version__
    timing = content["ops"]["diffuse"]["forward_backward"][0]
    assert timing["name"] == "twin" and timing["median_ms"] > 0
    assert abs(content["samples_kept"] / (8e6 / 64**2) - 1) < 0.03
    assert [row["kept"] > 0 for row in content["sweep"]] == [True, True]
    assert "needs a CUDA device" in capsys.readouterr().out


def test_bench_speed_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_speed, "RESULTS", tmp_path)
    bench_speed.main(bench_speed.Args(t=(250,), modes=("turbo", "5 steps"), n_prompts=1, n_views=1))
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["exact", "turbo", "5 steps"]
    assert [round(row["work"], 2) for row in rows] == [5.0, 2.01, 4.0]
    assert rows[0]["gradient"] == 0.0 < min(row["gradient"] for row in rows[1:])
    assert all(row["residual"] > 0.0 for row in rows)
    assert bench_speed.table(rows, "work").splitlines()[-1] == "| 5 steps | 4 |"


@pytest.mark.slow
def test_bench_generate_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.save, "__defaults__", (tmp_path,))
    args = bench_generate.Args(runs=1, steps=3, device="cpu", imports=True, options=SMALL_OPTIONS)
    bench_generate.main(args)
    content = json.loads((tmp_path / "generate_cpu.json").read_text())
    (run,) = content["runs"]
    seconds = run["seconds"]
    assert 0.0 < seconds["folder"] < seconds["model loaded"] < seconds["GLB"] < seconds["end"]
    assert 0.0 < seconds["in steps"] < seconds["GLB"] - seconds["model loaded"]
    assert run["steps"] == 3 and 0.0 <= run["iou"] <= 1.0 and run["rank"] >= 1
    assert content["import_seconds"].keys() >= {"torch", "diffusers", "transformers"}


def test_an_object_that_is_none_has_no_time(tmp_path: Path) -> None:
    args = bench_generate.Args(steps=2, device="cpu", options=SMALL_OPTIONS)
    bench_generate.generate(args, tmp_path / "run")
    with pytest.raises(AssertionError, match="IoU 0"):
        bench_generate.check(dataclasses.replace(args, steps=0), tmp_path / "run")


def test_compare_times_slow_ones_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_time_ms", lambda function: function())
    timings = harness.compare(
        [("slow", lambda: 100.0), ("fast", lambda: 4.0)], rounds=9, slow_ms=50.0
    )
    assert [(t.rounds, t.median_ms, t.ratio) for t in timings] == [(3, 100.0, 1.0), (9, 4.0, 25.0)]


def test_limits_follow_their_formula() -> None:
    assert ceilings.forward_flops(16) == 2 * 6400
    assert ceilings.backward_flops(16) == 2 * (6400 + 8640)
    assert ceilings.gathered_bytes(16) == 512 and ceilings.scattered_bytes(16) == 1024
    rates = {"copy_gbs": 3000.0, "l2_copy_gbs": 5000.0, "matmul_tflops": 700.0}
    assert "8.00 M samples x 512 B = 4.1 GB: 0.82 ms" in ceilings.limit_text(
        (7_000_000, 8_000_000), 16, rates
    )
