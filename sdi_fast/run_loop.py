"""One asset from its folder to its results, in turns that may alternate with other assets'."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointWriter, check_same_run, load_latest
from .config import Config
from .diffusion.pipeline import Pipeline
from .engine import Callback, Engine, StepMetrics
from .export import export_all
from .guidance import Guidance
from .runs import RunFolder, build_metrics, open_run
from .step import GraphHome


@dataclass(frozen=True)
class GenerateResult:
    """What a run left behind."""

    out: Path
    completed: bool  # False: stopped by request_stop; a checkpoint was saved, nothing exported
    step: int  # steps done, resumed ones included
    metrics: dict[str, Any]  # what metrics.json says; empty where not completed
    files: list[Path]


class RunEngine(Engine):
    """An engine that remembers that it was asked to stop, also in the last step of a turn."""

    stop_requested = False

    def request_stop(self) -> None:
        self.stop_requested = True
        super().request_stop()


class Run:
    """An engine and the folder that its checkpoints and results go to. Get one from `start_run`."""

    def __init__(self, engine: RunEngine, folder: RunFolder) -> None:
        self.engine = engine
        self.folder = folder
        self.seconds = 0.0  # in this run's own turns
        self._between_steps = True
        self._writer = CheckpointWriter(
            folder.path, engine.config, threaded=engine.device.type == "cuda"
        )
        self._writer.step = engine.global_step  # that of the one it was resumed from, or 0

    @property
    def completed(self) -> bool:
        """Whether all steps are done."""
        return self.engine.global_step >= self.engine.config.engine.max_steps

    def advance(self, callbacks: Sequence[Callback] = (), n_steps: int | None = None) -> None:
        """Does the next `n_steps` steps (None: all that are left), or fewer if asked to stop.

        Checkpoints are saved as the config says, and at the end of the run or at a stop.
        """
        end = self.engine.config.engine.max_steps
        if n_steps is not None:
            end = min(end, self.engine.global_step + n_steps)
        started = time.perf_counter()
        self._between_steps = False
        self.engine.run(callbacks=[self._save_now_and_then, *callbacks], until=end)
        self._between_steps = True
        if self.completed or self.engine.stop_requested:
            self.save()
        self.seconds += time.perf_counter() - started

    def save(self) -> None:
        """Saves a checkpoint, unless this step has one or a step was broken off by an exception.

        Raises:
            NonFiniteError: where the run turns out to have diverged in the steps that were queued.
        """
        self._writer.wait()
        if self._between_steps and self.engine.global_step > self._writer.step:
            self.engine.settle()
            self._write_checkpoint(in_bad_streak=True)
            self._writer.wait()

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.wait()

    def finish(self) -> GenerateResult:
        """Writes the results of a completed run."""
        engine, folder = self.engine, self.folder
        files, notes = export_all(engine, folder.path, engine.config.export)
        metrics = build_metrics(
            engine.config,
            engine.history,
            seconds=self.seconds,
            device=engine.device,
            notes=[*engine.pipeline.notes, *notes],
            ran=engine.ran,
        )
        files.append(folder.write_metrics(metrics))
        return GenerateResult(folder.path, True, engine.global_step, metrics, files)

    def unfinished(self) -> GenerateResult:
        """The result of a run that was stopped."""
        return GenerateResult(self.folder.path, False, self.engine.global_step, {}, [])

    def _save_now_and_then(self, engine: Engine, metrics: StepMetrics) -> None:
        every = engine.config.engine.checkpoint_every
        if every and engine.global_step % every == 0:
            self._write_checkpoint(in_bad_streak=False)

    def _write_checkpoint(self, in_bad_streak: bool) -> None:
        """Every checkpoint of a run is written here."""
        engine = self.engine
        self._writer.wait()  # so that there are no two snapshots in memory
        self._writer.save(engine.global_step, engine.snapshot(), in_bad_streak=in_bad_streak)


@contextlib.contextmanager
def start_run(
    config: Config,
    out: Path | str | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    pipeline: Pipeline | None = None,
    guidance: Guidance | None = None,
    home: GraphHome | None = None,
) -> Iterator[Run]:
    """A run of `config`, from its start or from a checkpoint, with its folder locked.

    Args:
        config: checked by the caller.
        out: the folder; outputs/<slug of the prompt> where None.
        resume: continue the newest good checkpoint of the folder, if it has one.
        overwrite: replace an earlier run in the folder.
        pipeline, guidance, home: to share with other runs; see `Engine`.

    Raises:
        SDIFastError: for bad input; nothing was written then.
    """
    with open_run(out, config.prompt, resume=resume, overwrite=overwrite) as folder:
        checkpoint = load_latest(folder.path) if resume else None
        if checkpoint is not None:
            check_same_run(config, checkpoint)
        engine = RunEngine(config, pipeline=pipeline, guidance=guidance, home=home)
        if checkpoint is not None:
            engine.load_state_tensors(checkpoint.tensors)
        folder.start(config)
        run = Run(engine, folder)
        try:
            yield run
        except BaseException:
            with contextlib.suppress(Exception):  # the error that ended the run is the one to tell
                run.close()
            raise
        run.close()


def memory_line(error: torch.OutOfMemoryError, config: Config, per_gpu: int = 1) -> str:
    """What ran out of memory and what to lower, on one line.

    Args:
        config: of the run that asked for the memory.
        per_gpu: assets that were optimised at a time.
    """
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    camera = config.camera
    views = f"{camera.batch_size} view{'s' * (camera.batch_size > 1)}"
    others = f", {per_gpu} assets at a time" if per_gpu > 1 else ""
    return (
        f"GPU out of memory{f' (asked for {asked[1]})' if asked else ''} with {views} of "
        f"{camera.height} x {camera.width} a step{others}; lower --size"
        f"{', camera.batch_size or --per-gpu' if per_gpu > 1 else ' or camera.batch_size'}; "
        "the last checkpoint, if there is one, stays"
    )
