"""sdi-fast batch: many assets in one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .cli_options import PLAIN, RunOptions
from .cli_text import complain, printable, say

if TYPE_CHECKING:
    from rich.console import Console

    from .batch import Asset, Batch, BatchItem
    from .progress import BatchReporter, StopOnSignal


@dataclasses.dataclass(frozen=True)
class BatchCommand(RunOptions):
    """Make a 3D object from each line of a file, in one process that loads the model once.

    One that fails does not stop the others. Ctrl-C saves a checkpoint of all that are in the
    making; the same command with --resume goes on. OUT/batch.json says what became of each.
    """

    file: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE", help_behavior_hint="")
    ] = dataclasses.field(kw_only=True)
    """A prompt a line (blank lines and lines that start with # do not count), or - for standard
    input; or a YAML list (.yaml, .yml) of prompts and of {prompt: ..., out: ..., seed: ...,
    set: {key: value}}."""
    out: Annotated[Path | None, PLAIN] = None
    """Folder for all; each object goes to one below it, named after its prompt (default:
    outputs)."""
    resume: Annotated[bool, PLAIN] = False
    """Pass over what is done in --out, and continue the rest from its last checkpoints."""
    overwrite: Annotated[bool, PLAIN] = False
    """Replace what was made of these prompts in --out."""
    per_gpu: Annotated[int, PLAIN] = 1
    """Objects that are optimised at a time, a step each in turn; each needs memory (default: 1)."""

    def run(self, console: Console) -> int:
        """Runs it; the exit code."""
        from .progress import BatchReporter, StopOnSignal, Stopped

        batch: Batch | None = None
        with StopOnSignal(also_in_last_step=True) as stop:
            with BatchReporter(console, quiet=self.quiet) as reporter:
                try:
                    batch = self._prepare(console, reporter, stop)
                    batch.run()
                except Stopped as stopped:
                    stop.signum = stopped.signum
        items = [] if batch is None else batch.items
        for item in items:
            say(console, line_of(item))
        _complain_notes(items)
        if batch is not None and items:
            say(console, f"{_summary(items)}: {batch.out / 'batch.json'}")
        if stop.signum is not None and not (items and all(map(is_done, items))):
            complain("the same command with --resume goes on", "stopped")
            return 128 + stop.signum
        return 0 if all(map(is_done, items)) else 1

    def _prepare(self, console: Console, reporter: BatchReporter, stop: StopOnSignal) -> Batch:
        """The batch, with everything checked that can be before it begins."""
        from .batch import Batch
        from .runs import OUTPUTS

        out = OUTPUTS if self.out is None else self.out
        assets, why = self.assets(out)
        say(console, f"model: {assets[0].config.model.id} ({why})")
        say(console, f"prompts: {len(assets)}, {self.per_gpu} at a time")
        say(console, f"output: {out}")
        reporter.expect([asset.config for asset in assets])
        return Batch(
            assets,
            out,
            per_gpu=self.per_gpu,
            resume=self.resume,
            overwrite=self.overwrite,
            callbacks=[reporter, stop],
            on_item=reporter.tell,
        )

    def assets(self, out: Path) -> tuple[list[Asset], str]:
        """What to make, below `out`, and why with that model."""
        from .batch import Asset
        from .batch_file import read_batch
        from .runs import prompt_slug
        from .types import SDIFastError

        entries = read_batch(self.file)
        _, why = self.config_for(entries[0].prompt)  # so that no entry is blamed for an option
        assets = []
        for entry in entries:
            folder = out / (entry.out or prompt_slug(entry.prompt))
            try:
                config, _ = self.config_for(entry.prompt, folder, entry.settings)
            except (OSError, ValueError) as error:  # also of a folder's name
                raise SDIFastError(f"{entry.where}: {error}") from error
            if config.prompt != entry.prompt:
                raise SDIFastError("set: expected no prompt, which the batch's file gives")
            assets.append(Asset(config, folder, entry.where))
        return assets, why


def is_done(item: BatchItem) -> bool:
    """Whether the item's results are there."""
    return item.status in ("done", "skipped")


def line_of(item: BatchItem) -> str:
    """What became of an asset, on one line."""
    from .progress import format_seconds

    prompt = printable(item.config.prompt)
    if item.status == "failed":
        return f"failed: {prompt}: {printable(item.error)}"
    if item.status == "done":
        return f"done: {prompt}: {item.out} ({format_seconds(item.seconds)})"
    if item.status == "skipped":
        return f"skipped: {prompt}: was done already in {item.out}"
    step = item.result.step if item.result is not None else 0
    return f"stopped: {prompt}: after {step} of {item.config.engine.max_steps} steps"


def _summary(items: list[BatchItem]) -> str:
    """Such as "3 done, 1 failed"."""
    statuses = [item.status for item in items]
    return ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))


def _complain_notes(items: list[BatchItem]) -> None:
    """The runs' notes; one that was said of another run already is not repeated."""
    said: set[str] = set()
    for item in items:
        for note in item.result.metrics.get("notes", []) if item.result is not None else ():
            if note not in said:
                complain(f"{item.out}: {note}", "note")
            said.add(note)
