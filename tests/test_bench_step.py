"""The whole step's benchmark at its tiniest, its check, and `sdi-fast bench`."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdi_fast import cli
from sdi_fast.bench import stored
from sdi_fast.bench.workload import Workload, choose_workload, still
from sdi_fast.guidance import sdi as sdi_module

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_step  # noqa: E402
import harness  # noqa: E402
import step_sections  # noqa: E402
import step_trace  # noqa: E402
from baseline import STAGES, BaselineStep, OfficialPeer  # noqa: E402
from test_benchmarks import HALF_TOLERANCE, _stand_in  # noqa: E402

CPU = torch.device("cpu")


def run(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a quick run."""
    code = bench_step.main(["--quick", "--device", "cpu", "--out", str(out), *options])
    return code, json.loads((out / "step_cpu.json").read_text())


def test_quick_run_end_to_end(tmp_path: Path) -> None:
    code, found = run(tmp_path, "--only", "baseline", "exact", "turbo")
    assert code == 0 and found["left_out"] == {}
    assert found["workload"] == "tiny" and found["conditions"]["torch"] == torch.__version__
    assert "stands in" in found["notes"][0]

    candidates = found["steps"]["candidates"]
    assert list(candidates) == ["baseline", "exact", "turbo"]
    for candidate in candidates.values():
        assert [row["t"] for row in candidate["timings"]] == [250, None]
        assert all(row["median_ms"] > 0 for row in candidate["timings"])
        assert candidate["speed_up"].keys() == {"250", "annealing"}
    counts = {c["timings"][0]["n_samples"] for c in candidates.values()}
    assert max(counts) - min(counts) <= 0.05 * max(counts)  # only the rays' offsets differ

    for name in ("exact", "turbo"):
        (row,) = found["checks"][name]
        assert row["failed"] == [] and row["gradients"].keys() >= {"table", "color_w2"}
        assert max(row["losses"].values()) < (1e-4 if name == "exact" else 0.5)

    for candidate in found["breakdown"]["candidates"].values():
        stages = candidate["stages_ms"]["250"]
        assert tuple(stages) == STAGES and all(ms > 0 for ms in stages.values())
        assert not candidate.get("missing")
    assert Image.open(tmp_path / "step_cpu.png").width > 1000

    assert found["idle"] == {"skipped": "needs a CUDA device"}
    assert found["real"]["turbo"]["n_samples"] > 0
    rows = found["scaling"]["rows"]
    assert {row["what"] for row in rows} == {"resolution", "views", "samples a ray", "prompts"}
    assert all(row["bound_by"] in STAGES for row in rows)
    assert all(row["ms"] > 0 for row in found["deterministic"]["backends"].values())
    assert found["deterministic"]["backends"].keys() == {"reference", "cpu"}
    assert found["long"]["exact"]["steps"] == 2 and found["long"]["exact"]["skipped"] == 0


def test_a_wrong_output_is_caught_before_it_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sdi_module.x0_loss
    monkeypatch.setattr(sdi_module, "x0_loss", lambda z, target: 2.0 * original(z, target))
    code, found = run(tmp_path, "--sections", "steps", "--only", "baseline", "exact")
    assert code == 1 and list(found["steps"]["candidates"]) == ["baseline"]
    assert found["checks"]["exact"].startswith("CheckError: t = 250: loss guidance")
    assert "exact: check" in found["left_out"]


def test_a_wrong_gradient_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gradient(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 0.5 * (z.detach() - target).square().mean() / len(z) + 0.0 * z.sum()

    monkeypatch.setattr(sdi_module, "x0_loss", no_gradient)
    code, found = run(tmp_path, "--sections", "steps", "--only", "exact")
    assert code == 1 and found["steps"]["candidates"] == {}
    assert "gradient" in found["checks"]["exact"]


def test_sections_beyond_the_time_limit_are_named_and_earlier_ones_kept(tmp_path: Path) -> None:
    options = ("--sections", "steps", "idle", "--only", "baseline")
    assert run(tmp_path, *options)[1]["steps"]["candidates"].keys() == {"baseline"}
    code, found = run(tmp_path, "--sections", "real", "long", "--time-limit", "0")
    assert code == 0 and set(found["left_out"]) == {"real", "long"}
    assert found["steps"]["candidates"].keys() == {"baseline"} and "real" not in found
    path = tmp_path / "step_cpu.json"
    path.write_text(json.dumps(found | {"workload": "another"}))
    assert bench_step.earlier(path, found["conditions"], "tiny") == {}


def test_baseline_with_nerfacc_steps_as_with_the_twin() -> None:
    workload = choose_workload(CPU, quick=True)
    pipeline = workload.pipeline(workload.config.model, CPU)
    results = []
    for is_peer in (True, False):
        step = BaselineStep(workload.config, pipeline)  # 2 of 4 levels
        with torch.no_grad():
            step.field.table.mul_(100.0)
        if is_peer:
            step.peer = OfficialPeer(_stand_in(), step.field.spec, "cpu")
        results.append((step.step(250, 0), step.field.table.grad))
    (peer, peer_grad), (twin, twin_grad) = results
    assert peer["losses"] == pytest.approx(twin["losses"], rel=10 * HALF_TOLERANCE, abs=1e-3)
    assert harness.relative_error(peer_grad, twin_grad) < 10 * HALF_TOLERANCE
    n = 2 * sum(step.field.spec.grid.level_sizes[:2])
    assert peer_grad[:n].any() and not peer_grad[n:].any()


def test_captures_do_not_count_as_steady() -> None:
    marks, seconds = [(0, 0.0)], 0.0
    for i in range(1, 101):
        seconds += 0.1 if i % 10 else 5.0  # one stretch in ten has a capture
        marks.append((10 * i, seconds))
    assert step_sections._steady_ms(marks) == pytest.approx(10.0)
    assert step_sections._steady_ms([(0, 0.0)]) == 0.0


def store(folder: Path, ms: float) -> None:
    row = {"t": 250, "median_ms": ms}
    steps = {"candidates": {name: {"timings": [row]} for name in ("baseline", "exact", "turbo")}}
    content = {"workload": "tiny", "conditions": {"gpu": "A GPU"}, "steps": steps}
    (folder / "step_a_gpu.json").write_text(json.dumps(content))
    (folder / "step_broken.json").write_text("{")


def test_times_are_compared_with_stored_ones(tmp_path: Path) -> None:
    store(tmp_path, 30.0)
    rows = stored.compare_with_stored("tiny", {("exact", 250): 10.0, ("exact", None): 1.0})
    assert not [row for row in rows if row.device == "A GPU"]
    rows = stored.compare_with_stored("tiny", {("exact", 250): 10.0}, [tmp_path])
    assert [(row.candidate, row.ratio) for row in rows] == [("baseline", 3.0), ("exact", 3.0)]
    assert stored.compare_with_stored("sd21-512", {("exact", 250): 10.0}, [tmp_path]) == []


def test_bench_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(tmp_path, 1e6)
    monkeypatch.setattr(stored, "result_folders", lambda: [tmp_path])
    assert cli.main(["bench", "--quick", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "UNet calls" in text and "600 steps of this" in text
    (line,) = [line for line in text.splitlines() if "A GPU, exact, t = 250" in line]
    assert line.endswith("x faster") and "1000000.0 ms" in line

    assert cli.main(["bench", "--quick", "--device", "cpu", "--speed", "turbo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["workload"] == "tiny" and report["ran"]["denoiser"] == "fast"
    assert {row["candidate"] for row in report["stored"]} == {"baseline", "turbo"}


def test_full_size_workload_is_the_official_config() -> None:
    workload = choose_workload(torch.device("cuda"))
    assert isinstance(workload, Workload) and workload.name == "sd21-512"
    config = still(workload.config)
    assert config.field.active_levels(0) == 16 and config.camera.height == 512
    path = workload.annealing()
    assert len(path) == 40 and (path[0], path[-1]) == (980, 250)


def test_busy_time_is_the_union_of_kernels(tmp_path: Path) -> None:
    kernels = [
        step_trace.Kernel("a", 0, 10, 7),
        step_trace.Kernel("b" * 200, 5, 8, 7),
        step_trace.Kernel("c", 9, 20, 8),
        step_trace.Kernel("d", 30, 40, 7),
    ]
    assert step_trace.busy_ns(kernels) == 30 and step_trace.span_ns(kernels) == 40
    assert step_trace.busy_ns([]) == step_trace.span_ns([]) == 0
    path = tmp_path / "trace.json.gz"
    assert step_trace.save_trace(path, kernels, "test") == 4
    trace = json.loads(gzip.decompress(path.read_bytes()))
    assert [e["dur"] for e in trace["traceEvents"]] == [0.01, 0.003, 0.011, 0.01]


def test_a_stored_trace_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_trace, "MAX_BYTES", 2000)
    draws = torch.randint(10**6, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    kernels = [step_trace.Kernel(f"k{d}", 10 * i, 10 * i + d, 7) for i, d in enumerate(draws)]
    kept = step_trace.save_trace(tmp_path / "trace.json.gz", kernels, "test")
    assert 0 < kept < 1000 and (tmp_path / "trace.json.gz").stat().st_size < 2000


def test_the_given_commit_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDI_FAST_COMMIT", "abc1234")
    assert harness.conditions()["commit"] == "abc1234"
    monkeypatch.delenv("SDI_FAST_COMMIT")
    assert harness.conditions()["commit"] != "abc1234"
