"""Prompt to files: whole runs around the engine, for Python and for the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from .batch import Asset, Batch, BatchItem
from .config import Config, toyworld_config
from .config_io import check_config, check_prompt
from .constants import BUNDLED_MODEL_ID, DEFAULT_MODEL_ID
from .engine import Callback
from .run_loop import GenerateResult, memory_line, start_run
from .runs import prompt_slug
from .types import SDIFastError


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
        torch.OutOfMemoryError: on a GPU; its text says what to lower. The last checkpoint stays.
    """
    config = _settle(prompt, model, steps, seed)
    try:
        with start_run(config, out, resume=resume, overwrite=overwrite) as run:
            run.advance(callbacks)
            return run.finish() if run.completed else run.unfinished()
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(memory_line(error, config)) from error


def generate_batch(
    prompts: Sequence[str | Config],
    *,
    out: Path | str,
    per_gpu: int = 1,
    model: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> list[BatchItem]:
    """Makes several objects in one process that loads the frozen networks once.

    One that fails does not stop the others. `out`/batch.json says what became of each.

    Args:
        prompts: what to make; whole Configs among them (`model` has to be None then).
        out: folder for all; each object goes to `out`/<slug of its prompt>.
        per_gpu: objects that are optimised at a time, a step each in turn.
        model, steps, seed: as for `generate`.
        resume: skip the objects that are done, continue those that have a checkpoint.
        overwrite: replace earlier runs in the objects' folders.
        callbacks: called as callback(engine, metrics) after every step of every object; one may
            call engine.request_stop(), which saves a checkpoint of every object in the making and
            ends the batch early.

    Returns:
        What became of each, in the order of `prompts`.

    Raises:
        SDIFastError: for bad input; nothing was written then.
    """
    if isinstance(prompts, str | Config):
        raise SDIFastError("prompts: expected a list, got a single one")
    assets = []
    for i, prompt in enumerate(prompts):
        where = f"prompts[{i}]"
        try:
            config = _settle(prompt, model, steps, seed)
        except SDIFastError as error:
            raise SDIFastError(f"{where}: {error}") from error
        assets.append(Asset(config, Path(out) / prompt_slug(config.prompt), where))
    batch = Batch(
        assets,
        Path(out),
        per_gpu=per_gpu,
        resume=resume,
        overwrite=overwrite,
        callbacks=callbacks,
    )
    batch.run()
    return batch.items


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
