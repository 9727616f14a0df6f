"""Several assets in one process: one frozen model, turns of a step each, failures kept apart."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .config import Config, GuidanceConfig
from .diffusion.pipeline import Pipeline, load_pipeline
from .engine import Callback, NonFiniteError
from .guidance import Guidance, make_guidance
from .placement import resolve_device, settle_guidance
from .run_loop import GenerateResult, Run, memory_line, start_run
from .runs import check_vacant, is_finished, make_folder, write_json
from .step import GraphHome
from .types import SDIFastError

REPORT_NAME = "batch.json"
TURN_STEPS = 1  # steps of one asset before the next one's turn
# What ends one asset and leaves the others be: bad input, the disk, divergence, and whatever else
# torch and a GPU raise, memory included.
FAILURES = (SDIFastError, OSError, RuntimeError)

Status = Literal["done", "failed", "stopped", "skipped"]


@dataclass(frozen=True)
class Asset:
    """One asset to be made."""

    config: Config
    out: Path
    where: str  # what messages call it, e.g. "prompts.txt, line 3"


@dataclass(frozen=True)
class BatchItem:
    """What became of one asset."""

    config: Config
    out: Path
    status: Status  # "skipped": it was done already
    error: str = ""  # one line, of a failed one
    seconds: float = 0.0  # in its own turns of this process, loading and export included
    result: GenerateResult | None = None  # None where it failed, was skipped or did not begin


@dataclass
class _Running:
    """An asset whose folder is locked and whose engine is in memory."""

    index: int
    run: Run
    stack: contextlib.ExitStack  # gives the lock back

    def close(self) -> None:
        """Gives the lock back. What a last checkpoint met with is not told: one that matters was
        waited for, and what else has ended the asset is."""
        with contextlib.suppress(OSError):
            self.stack.close()


@dataclass
class _Guidances:
    """The guidance objects of the last few configs: equal configs share buffers and graphs."""

    limit: int
    kept: list[tuple[GuidanceConfig, Guidance]] = field(default_factory=list)  # newest first

    def get(self, pipeline: Pipeline, config: GuidanceConfig) -> Guidance:
        fitting = [entry for entry in self.kept if entry[0] == config]
        others = [entry for entry in self.kept if entry[0] != config]
        if not fitting:
            own = settle_guidance(config, pipeline.device)
            fitting = [(config, make_guidance(pipeline, own))]
        self.kept = [*fitting, *others][: self.limit]
        return fitting[0][1]


class Batch:
    """Makes assets, `per_gpu` at a time, and says in `items` what became of each.

    Args:
        assets: what to make; their models, devices and threads have to be the same.
        out: folder of batch.json, and of the assets where they are below it.
        per_gpu: assets that are optimised at a time, a step each in turn. Each needs memory.
        resume: skip what is done, continue what has a checkpoint.
        overwrite: replace earlier runs in the assets' folders.
        callbacks: called as callback(engine, metrics) after every step of every asset; one may
            call engine.request_stop(), which saves a checkpoint of every running asset and ends
            the batch.
        on_item: called when it is known what becomes of an asset.

    Raises:
        SDIFastError: where the assets do not fit together.
    """

    def __init__(
        self,
        assets: Sequence[Asset],
        out: Path,
        *,
        per_gpu: int = 1,
        resume: bool = False,
        overwrite: bool = False,
        callbacks: Sequence[Callback] = (),
        on_item: Callable[[BatchItem], None] | None = None,
    ) -> None:
        if per_gpu < 1:
            raise SDIFastError(f"per_gpu: expected at least 1, got {per_gpu}")
        if resume and overwrite:
            raise SDIFastError("resume, overwrite: expected at most one of the two, got both")
        if not assets:
            raise SDIFastError("batch: expected at least one prompt, got none")
        _check_folders(assets)
        _check_shared(assets)
        self.assets = list(assets)
        self.out = out
        self.per_gpu = per_gpu
        self.resume = resume
        self.overwrite = overwrite
        self.callbacks = callbacks
        self.on_item = on_item
        self._waiting = list(range(len(assets)))
        self._running: list[_Running] = []
        self._ended: dict[int, BatchItem] = {}
        self._seconds = [0.0] * len(assets)
        self._pipeline: Pipeline | None = None
        self._guidances = _Guidances(per_gpu)
        self._home: GraphHome | None = None  # of all assets' graphs
        self._stop = False
        self._has_garbage = False

    @property
    def items(self) -> list[BatchItem]:
        """The assets of which it is known, in their order; after `run` that is all of them."""
        return [self._ended[index] for index in sorted(self._ended)]

    def run(self) -> None:
        """Makes the assets and writes batch.json.

        KeyboardInterrupt saves a checkpoint of every running asset, but for one whose step it
        interrupted, and is raised again.

        Raises:
            SDIFastError: for a model that cannot be loaded, or a folder that cannot be made;
                nothing was written then.
        """
        try:
            while (self._waiting or self._running) and not self._stop:
                self._round()
            self._stop_rest()
        except KeyboardInterrupt:
            self._stop_rest()
            raise
        finally:
            for running in self._running:  # after an error that no asset is to blame for
                running.close()

    # ---- turns ----------------------------------------------------------------------------

    def _round(self) -> None:
        """Fills the free places and gives everyone a turn."""
        self._free_memory()
        while self._waiting and len(self._running) < self.per_gpu:
            self._start(self._waiting[0])
        alone = self.per_gpu == 1 or (len(self._running) == 1 and not self._waiting)
        for running in list(self._running):
            self._turn(running, None if alone else TURN_STEPS)
            if self._stop:
                return

    def _start(self, index: int) -> None:
        asset = self.assets[index]
        is_done = False
        with self._charged_to(index):
            is_done = self.resume and is_finished(asset.out, asset.config)
            check_vacant(asset.out, resume=self.resume, overwrite=self.overwrite)
        if is_done:
            self._end(index, "skipped")
        if index in self._ended:
            return
        if self._pipeline is None:
            self._pipeline = self._load(asset.config)
            if self._pipeline.device.type == "cuda":
                self._home = GraphHome(self._pipeline.device)
            make_folder(self.out)
        with self._charged_to(index), contextlib.ExitStack() as stack:
            run = stack.enter_context(
                start_run(
                    asset.config,
                    asset.out,
                    resume=self.resume,
                    overwrite=self.overwrite,
                    pipeline=self._pipeline,
                    guidance=self._guidances.get(self._pipeline, asset.config.guidance),
                    home=self._home,
                )
            )
            self._running.append(_Running(index, run, stack.pop_all()))
            self._waiting.remove(index)

    def _turn(self, running: _Running, n_steps: int | None) -> None:
        run, result = running.run, None
        with self._charged_to(running.index):
            run.advance(self.callbacks, n_steps)
            self._stop = run.engine.stop_requested
            if run.completed and not self._stop:
                result = run.finish()
        if result is not None:
            self._end(running.index, "done", result=result)

    def _load(self, config: Config) -> Pipeline:
        try:
            return load_pipeline(config.model, resolve_device(config.engine.device))
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(memory_line(error, config)) from error

    @contextlib.contextmanager
    def _charged_to(self, index: int) -> Iterator[None]:
        """The block's time is the asset's, and what fails in it ends the asset alone."""
        started, why = time.perf_counter(), ""
        try:
            yield
        except FAILURES as error:
            why = self._one_line(error, self.assets[index].config)
        finally:
            self._seconds[index] += time.perf_counter() - started
        if why:
            self._end(index, "failed", error=why)

    def _one_line(self, error: BaseException, config: Config) -> str:
        if isinstance(error, torch.OutOfMemoryError):
            self._guidances.kept.clear()  # it may have been in the middle of a capture
            return memory_line(error, config, self.per_gpu)
        text = " ".join(str(error).split())
        expected = isinstance(error, SDIFastError | NonFiniteError | OSError)
        return text if expected and text else f"{type(error).__name__}: {text}".rstrip(": ")

    # ---- ends -----------------------------------------------------------------------------

    def _end(self, index: int, status: Status, **more: Any) -> None:
        """Records what became of an asset and gives its lock back."""
        asset = self.assets[index]
        item = BatchItem(asset.config, asset.out, status, seconds=self._seconds[index], **more)
        self._ended[index] = item
        self._waiting = [other for other in self._waiting if other != index]
        for running in [r for r in self._running if r.index == index]:
            self._running.remove(running)
            running.close()
        self._has_garbage = True
        if self.on_item is not None:
            self.on_item(item)

    def _free_memory(self) -> None:
        """Lets go of ended assets; called where no frame or exception holds their tensors."""
        if self._has_garbage:
            self._has_garbage = False
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _stop_rest(self) -> None:
        """Saves what is running, marks it and what is waiting as stopped, and writes batch.json."""
        for running in list(self._running):
            with self._charged_to(running.index):
                running.run.save()
            if running.index not in self._ended:
                self._end(running.index, "stopped", result=running.run.unfinished())
        for index in list(self._waiting):
            self._end(index, "stopped")
        if self.out.is_dir() or any(item.status != "stopped" for item in self.items):
            self._report()

    def _report(self) -> None:
        make_folder(self.out)
        rows = [
            {
                "prompt": item.config.prompt,
                "folder": str(item.out),
                "status": item.status,
                "error": item.error,
                "seconds": item.seconds,
            }
            for item in self.items
        ]
        write_json(self.out / REPORT_NAME, {"per_gpu": self.per_gpu, "assets": rows})


def _check_folders(assets: Sequence[Asset]) -> None:
    """Raises SDIFastError where two assets would write to one folder, or one below another's."""
    owners: dict[Path, Asset] = {}
    for asset in assets:
        try:
            path = Path(os.path.realpath(asset.out))
        except (OSError, ValueError) as error:  # ValueError: a null character
            raise SDIFastError(f"{asset.where}: out: expected a folder, got {error}") from error
        if path in owners:
            raise SDIFastError(
                f"{asset.where}: out: {asset.out} is the folder of {owners[path].where} already"
            )
        owners[path] = asset
    for path, asset in owners.items():
        for above in path.parents:
            if above in owners:
                raise SDIFastError(
                    f"{asset.where}: out: {asset.out} is inside of the folder of "
                    f"{owners[above].where}"
                )


def _check_shared(assets: Sequence[Asset]) -> None:
    """Raises SDIFastError where an asset asks for what one process has only one of."""
    first = assets[0].config
    for asset in assets[1:]:
        config = asset.config
        for key, mine, other in (
            ("model", config.model, first.model),
            ("engine.device", config.engine.device, first.engine.device),
            ("engine.threads", config.engine.threads, first.engine.threads),
        ):
            if mine != other:
                raise SDIFastError(
                    f"{asset.where}: {key}: expected that of {assets[0].where}, since a batch "
                    "shares it, got another"
                )
