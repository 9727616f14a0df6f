"""A step's numbers on their way to the host, and checkpoints that are written beside the loop."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sdi_fast.checkpoint import CheckpointWriter, list_checkpoints, load_checkpoint
from sdi_fast.config import Config
from sdi_fast.readback import ROW_HEAD, PendingMetrics, Reading, Snapshot, StepMetrics, upload

NAMES = (*ROW_HEAD, "guidance", "orient")
ROW = torch.tensor([1.5, 7.0, 1.0, 2.0, 0.25, 0.125], dtype=torch.float64)


class Slow(Reading):
    """A row that a device has not given yet."""

    def __init__(self) -> None:
        super().__init__(ROW, NAMES)
        self.arrived = False
        self.waits = 0

    @property
    def ready(self) -> bool:
        return self.arrived

    def read(self) -> dict[str, float]:
        self.waits += not self.arrived
        self.arrived = True
        return super().read()


def test_metrics_wait_only_for_what_the_device_has() -> None:
    reading = Slow()
    metrics = PendingMetrics(3, 615, 9, 0.5, reading)
    assert (metrics.step, metrics.t, metrics.n_unet_calls, metrics.seconds) == (3, 615, 9, 0.5)
    assert not metrics.ready and reading.waits == 0
    assert metrics.loss == 1.5 and reading.waits == 1
    assert metrics.ready and metrics.skipped is True and metrics.n_samples == 7
    assert metrics.bad_steps == 2 and metrics.losses == {"guidance": 0.25, "orient": 0.125}
    assert isinstance(metrics, StepMetrics)
    assert metrics.settled() == StepMetrics(
        3, 1.5, 615, {"guidance": 0.25, "orient": 0.125}, 7, 9, True, 0.5, 2
    )


def test_a_reading_is_of_its_own_moment() -> None:
    row = ROW.clone()
    reading = Reading(row, NAMES)
    row.zero_()
    assert reading.ready and reading.read()["loss"] == 1.5


def test_a_snapshot_is_of_its_own_moment() -> None:
    value = torch.arange(4.0)
    snapshot = Snapshot({"a": value}, lambda: {"b": torch.ones(1)})
    value.zero_()
    tensors = snapshot.tensors()
    assert torch.equal(tensors["a"], torch.arange(4.0)) and torch.equal(tensors["b"], torch.ones(1))


def test_uploads_leave_the_values_alone() -> None:
    value = torch.arange(3.0)
    assert torch.equal(upload(value, torch.device("cpu")), value)


# ---- checkpoints --------------------------------------------------------------------------------


class Held(Snapshot):
    """A snapshot that arrives when it is let go."""

    def __init__(self, bad_steps: int = 0) -> None:
        super().__init__({"engine.bad_steps": torch.tensor(bad_steps)}, dict)
        self.let_go = threading.Event()

    def tensors(self) -> dict[str, torch.Tensor]:
        assert self.let_go.wait(20.0)
        return super().tensors()


def test_writing_does_not_hold_the_loop_up(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, Config(), threaded=True)
    first, second = Held(), Held()
    writer.save(5, first, in_bad_streak=False)
    assert list_checkpoints(tmp_path) == [] and writer.step == 0
    first.let_go.set()
    second.let_go.set()
    writer.save(7, second, in_bad_streak=False)  # waits for the first
    assert load_checkpoint(tmp_path / "checkpoint-000005.safetensors").step == 5
    writer.wait()
    assert writer.step == 7 and len(list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("threaded", [False, True])
def test_a_bad_streak_is_left_out_unless_it_is_the_end(tmp_path: Path, threaded: bool) -> None:
    writer = CheckpointWriter(tmp_path, Config(), threaded=threaded)
    for step, always in ((3, False), (4, True)):
        snapshot = Held(bad_steps=2)
        snapshot.let_go.set()
        writer.save(step, snapshot, in_bad_streak=always)
        writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-000004.safetensors"]
    assert writer.step == 4


def test_what_goes_wrong_in_the_thread_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdi_fast.checkpoint.write_checkpoint", full)
    writer = CheckpointWriter(tmp_path, Config(), threaded=True)
    snapshot = Held()
    snapshot.let_go.set()
    writer.save(1, snapshot, in_bad_streak=False)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.wait()  # once is enough
    assert writer.step == 0
