"""Prompt to files: the whole run around the engine, for Python and for the command line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import check_same_run, load_latest, write_checkpoint
from .config import Config, toyworld_config
from .config_io import check_config, check_prompt
from .constants import BUNDLED_MODEL_ID, DEFAULT_MODEL_ID
from .engine import Callback, Engine, StepMetrics
from .export import export_all
from .runs import RunFolder, build_metrics, open_run
from .types import SDIFastError


@dataclass(frozen=True)
class GenerateResult:
    """What a run left behind."""

    out: Path
    completed: bool  # False: stopped by request_stop; a checkpoint was saved, nothing exported
    step: int  # steps done, resumed ones included
    metrics: dict[str, Any]  # what metrics.json says; empty where not completed
    files: list[Path]


def base_config(prompt: str, model: str | None = None) -> Config:
    """The settings that a model wants, with `prompt` filled in.

    Without a model: Stable Diffusion 2.1 where a CUDA device is, the bundled model elsewhere.
    """
    if model is None:
        model = DEFAULT_MODEL_ID if torch.cuda.is_available() else BUNDLED_MODEL_ID
    config = toyworld_config() if model == BUNDLED_MODEL_ID else Config()
    return dataclasses.replace(
        config, prompt=prompt, model=dataclasses.replace(config.model, id=model)
    )


def generate(
    prompt: str | Config,
    *,
    out: Path | str | None = None,
    model: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> GenerateResult:
    """Optimises a 3D object for `prompt` and writes it to a folder.

    Args:
        prompt: what to make, or a whole Config (then `model` has to be None).
        out: the folder; outputs/<slug> where None.
        model: "toyworld", a diffusers folder or a hub id; see `base_config`.
        steps: length of the run; every schedule follows it (`Config.with_steps`).
        seed: fixes every random draw.
        resume: continue the newest good checkpoint of the folder, if it has one.
        overwrite: replace an earlier run in the folder.
        callbacks: called as callback(engine, metrics) after every step; one may call
            engine.request_stop(), which saves a checkpoint and ends the run early.

    Raises:
        SDIFastError: for bad input; nothing was written then.
        NonFiniteError: when the run diverged; its last good checkpoint stays.
    """
    config = _settle(prompt, model, steps, seed)
    with open_run(out, config.prompt, resume=resume, overwrite=overwrite) as folder:
        checkpoint = load_latest(folder.path) if resume else None
        if checkpoint is not None:
            check_same_run(config, checkpoint)
        engine = Engine(config)
        if checkpoint is not None:
            engine.load_state_tensors(checkpoint.tensors)
        folder.start(config)
        started = time.perf_counter()
        _optimise(engine, folder, callbacks)
        seconds = time.perf_counter() - started
        completed = engine.global_step >= config.engine.max_steps
        if not completed:
            return GenerateResult(folder.path, False, engine.global_step, {}, [])
        files, notes = export_all(engine, folder.path, config.export)
        metrics = build_metrics(
            config,
            engine.history,
            seconds=seconds,
            device=engine.device,
            notes=[*engine.pipeline.notes, *notes],
            ran=engine.ran,
        )
        files.append(folder.write_metrics(metrics))
        return GenerateResult(folder.path, True, engine.global_step, metrics, files)


def _settle(prompt: str | Config, model: str | None, steps: int | None, seed: int | None) -> Config:
    """The run's config, checked."""
    if isinstance(prompt, Config):
        if model is not None:
            raise SDIFastError("model: expected None beside a whole Config, which names its model")
        config = prompt
        check_prompt(config.prompt)
    else:
        check_prompt(prompt)
        config = base_config(prompt, model)
    if steps is not None:
        config = config.with_steps(steps)
    if seed is not None:
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, seed=seed))
    check_config(config)
    return config


def _optimise(engine: Engine, folder: RunFolder, callbacks: Sequence[Callback]) -> None:
    """Runs to the end or to a stop, with checkpoints; the last one is always saved."""
    every = engine.config.engine.checkpoint_every

    def save(engine: Engine, metrics: StepMetrics | None = None) -> None:
        write_checkpoint(folder.path, engine.global_step, engine.state_tensors(), engine.config)

    def save_now_and_then(engine: Engine, metrics: StepMetrics) -> None:
        # A bad streak is not saved, so that the last checkpoint is one to go back to.
        if every and engine.global_step % every == 0 and not engine.bad_steps:
            save(engine)

    before = engine.global_step
    engine.run(callbacks=[save_now_and_then, *callbacks])
    saved_already = every and engine.global_step % every == 0 and not engine.bad_steps
    if engine.global_step > before and not saved_already:
        save(engine)
