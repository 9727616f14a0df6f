"""What is queued when something else happens: checkpoints in their thread, steps on a device."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import small_config

import sdi_fast.step as step_module
from sdi_fast.checkpoint import CheckpointWriter, list_checkpoints, load_latest
from sdi_fast.config import Config
from sdi_fast.constants import MAX_BAD_STEPS
from sdi_fast.engine import Engine, NonFiniteError
from sdi_fast.readback import Snapshot, StepMetrics
from sdi_fast.run_loop import start_run
from sdi_fast.step import RunningStep, StepGraphs


def snapshot(value: float = 0.0, bad_steps: int = 0, finish: Any = dict) -> Snapshot:
    state = {"x": torch.tensor(value), "engine.bad_steps": torch.tensor(bad_steps)}
    return Snapshot(state, finish)


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[11:17]) for path in list_checkpoints(folder)]


# ---- checkpoints in their thread ----------------------------------------------------------------


@pytest.mark.parametrize("threaded", [False, True])
def test_checkpoints_are_written_in_order_and_bad_ones_left_out(
    threaded: bool, tmp_path: Path
) -> None:
    writer = CheckpointWriter(tmp_path, Config(), threaded=threaded)
    for step, bad_steps, in_bad_streak in ((1, 0, False), (2, 1, False), (3, 2, True)):
        writer.save(step, snapshot(step, bad_steps), in_bad_streak=in_bad_streak)
    writer.wait()
    assert writer.step == 3 and steps_in(tmp_path) == [1, 3]
    newest = load_latest(tmp_path)
    assert newest is not None and newest.tensors["x"] == 3.0


def test_the_loop_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    arrived = threading.Event()

    def finish() -> dict[str, torch.Tensor]:
        assert arrived.wait(30)
        return {"late": torch.ones(2)}

    writer = CheckpointWriter(tmp_path, Config(), threaded=True)
    writer.save(1, snapshot(finish=finish), in_bad_streak=False)
    assert not list_checkpoints(tmp_path) and writer.step == 0
    arrived.set()
    writer.wait()
    newest = load_latest(tmp_path)
    assert newest is not None and newest.tensors["late"].tolist() == [1.0, 1.0]


def test_an_error_of_the_thread_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    def finish() -> dict[str, torch.Tensor]:
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(tmp_path, Config(), threaded=True)
    writer.save(1, snapshot(finish=finish), in_bad_streak=False)
    with pytest.raises(OSError, match="No space"):
        writer.save(2, snapshot(), in_bad_streak=False)
    writer.wait()
    writer.save(3, snapshot(), in_bad_streak=False)
    writer.wait()
    assert steps_in(tmp_path) == [3]


def test_a_snapshot_is_let_go_of_by_the_thread_that_made_it(tmp_path: Path) -> None:
    """The other one could free pinned memory in the middle of a capture."""
    by: list[int] = []
    made = snapshot()
    weakref.finalize(made, lambda: by.append(threading.get_ident()))
    writer = CheckpointWriter(tmp_path, Config(), threaded=True)
    writer.save(1, made, in_bad_streak=False)
    del made
    assert writer._last is not None
    writer._last.result(30)
    assert by == []
    writer.wait()
    assert by == [threading.get_ident()]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_wait_that_is_interrupted_can_be_repeated(tmp_path: Path) -> None:
    """The folder's lock is not given back while the thread still writes."""
    arrived = threading.Event()

    def finish() -> dict[str, torch.Tensor]:
        assert arrived.wait(30)
        return {}

    writer = CheckpointWriter(tmp_path, Config(), threaded=True)
    writer.save(1, snapshot(finish=finish), in_bad_streak=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            writer.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    timer.join()
    threading.Timer(0.2, arrived.set).start()
    writer.wait()
    assert steps_in(tmp_path) == [1]


# ---- graphs -------------------------------------------------------------------------------------


class NoGraph:
    """A capture that runs what it captures; replays do nothing."""

    def replay(self) -> None:
        pass


@pytest.mark.parametrize("broken_in", ["the inversion", "the second capture"])
def test_graphs_of_a_step_that_was_broken_off_are_made_anew(
    broken_in: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    monkeypatch.setattr(step_module, "capturing", lambda *_: contextlib.nullcontext())
    engine = Engine(small_config(tiny, "a mug"))
    graphs = StepGraphs(engine.halves, SimpleNamespace(pool=None))  # type: ignore[arg-type]

    def begin() -> tuple[RunningStep, Any]:
        shading = engine._draw(0)
        running = graphs.run(0, shading)
        return running, engine._target(running.latents, 0, None, None)

    running, target = begin()
    assert running.pair is None  # kernel by kernel
    running.finish(target)
    broken, target = begin()
    if broken_in == "the second capture":
        with monkeypatch.context() as patch:
            patch.setattr(engine.optimizer, "step", throw_interrupt)
            with pytest.raises(KeyboardInterrupt):
                broken.finish(target)  # autograd's graph is used up
    running, target = begin()
    assert running.pair is not None and running.pair is not broken.pair and graphs.n_kinds == 1
    running.finish(target)
    again, target = begin()
    assert again.pair is running.pair and running.pair.half is None
    assert engine.optimizer.n_steps == 2


def throw_interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


# ---- queued steps -------------------------------------------------------------------------------


class Queued:
    """The metrics of a step that a device is still at."""

    def __init__(self, step: int, bad_steps: int = 0, interrupts: int = 0) -> None:
        self.metrics = StepMetrics(step, 1.0, 500, {}, 7, 3, bad_steps > 0, 0.1, bad_steps)
        self.interrupts = interrupts

    def settled(self) -> StepMetrics:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        return self.metrics


def test_a_wait_that_is_interrupted_loses_no_step(tiny: Path) -> None:
    engine = Engine(small_config(tiny, "a mug"))
    queue: Any = engine._pending
    queue.extend([Queued(0), Queued(1, interrupts=1), Queued(2)])
    engine.global_step = 3
    with pytest.raises(KeyboardInterrupt):
        engine.settle()
    assert engine.step().step == 3
    assert [row["n_samples"] for row in engine.history[:3]] == [7.0] * 3
    assert len(engine.history) == 4


def test_a_run_that_has_diverged_in_its_queue_is_not_saved(tiny: Path, tmp_path: Path) -> None:
    """Stopped before it is known: the good checkpoint before stays the last one."""
    with start_run(small_config(tiny, "a mug", 9), tmp_path / "out") as run:
        run.advance(n_steps=2)
        run.save()
        queue: Any = run.engine._pending
        queue.extend([Queued(2, MAX_BAD_STEPS), Queued(3, MAX_BAD_STEPS + 1)])
        run.engine.global_step = 4
        with pytest.raises(NonFiniteError, match=f"in {MAX_BAD_STEPS} steps in a row"):
            run.save()
        assert run.engine.global_step == 3
    assert steps_in(tmp_path / "out") == [2]
