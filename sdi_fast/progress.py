"""What the command line shows while a run goes on, and how a signal stops it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .batch import BatchItem
from .cli_text import printable, say
from .config import Config
from .engine import Engine, StepMetrics

PLAIN_LINES = 10  # of a whole run, where there is no terminal


class Reporter:
    """An engine callback: a progress bar on a terminal, about ten plain lines elsewhere."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.n_skipped = 0
        self._bar: Progress | None = None
        self._task: Any = None
        self._began: tuple[float, int] | None = None  # time and steps done before this session
        self._waiting: deque[StepMetrics] = deque()  # whose numbers a GPU still has
        self._newest: StepMetrics | None = None  # of those that have come

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away, so that plain lines can follow."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, engine: Engine, metrics: StepMetrics) -> None:
        done, total = engine.global_step, engine.config.engine.max_steps
        self._waiting.append(metrics)
        self._take(until=metrics if done >= total else None)
        if self._began is None:
            self._began = (time.monotonic() - metrics.seconds, metrics.step)
            if not self.quiet:
                self._print_notes(engine)
        if self.quiet:
            return
        if self.console.is_terminal:
            self._show_bar(done, total)
        else:
            self._print_line(metrics, done, total)
        if done >= total:
            self.close()
            self.console.print("writing field, previews, mesh and turntable ...", markup=False)

    def _take(self, until: StepMetrics | None = None) -> None:
        """Takes in the metrics that are ready; waits for those up to `until`."""
        while self._waiting and (until is not None or self._waiting[0].ready):
            self._newest = self._waiting.popleft()
            self.n_skipped += self._newest.skipped
            if self._newest is until:
                return

    def _print_notes(self, engine: Engine) -> None:
        for note in engine.pipeline.notes:
            say(self.console, f"note: {note}")

    def _show_bar(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = _make_bar(self.console, "optimising")
            self._task = self._bar.add_task("", total=total, completed=done - 1, note="")
            self._bar.start()
        self._bar.update(self._task, completed=done, note=self._note(self._newest))

    def _print_line(self, metrics: StepMetrics, done: int, total: int) -> None:
        began, before = self._began or (time.monotonic(), 0)
        mark = done * PLAIN_LINES // total > (done - 1) * PLAIN_LINES // total
        if not mark and done != before + 1:
            return
        self._take(until=metrics)
        left = (time.monotonic() - began) / max(done - before, 1) * (total - done)
        say(
            self.console,
            f"step {done}/{total}  {self._note(metrics)}  {format_seconds(left)} left",
        )

    def _note(self, metrics: StepMetrics | None) -> str:
        if metrics is None:
            return ""
        skipped = f"  ({self.n_skipped} steps skipped: not finite)" if self.n_skipped else ""
        return f"loss {metrics.loss:.4f}  t {metrics.t}{skipped}"


class BatchReporter:
    """Likewise for a whole batch, and a line for each asset that has ended."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self._left: dict[int, int] = {}  # steps, by the identity of an asset's config
        self._total = 0
        self._n_steps = 0  # done in this process
        self._counts: dict[str, int] = {}  # ended assets, by status
        self._began = 0.0
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> BatchReporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def expect(self, configs: Sequence[Config]) -> None:
        """Says what the batch will be of; the configs are those that the engines will have."""
        self._left = {id(config): config.engine.max_steps for config in configs}
        self._total = sum(self._left.values())

    def __call__(self, engine: Engine, metrics: StepMetrics) -> None:
        """An engine callback."""
        if not self._n_steps:
            self._began = time.monotonic() - metrics.seconds
            for note in () if self.quiet else engine.pipeline.notes:
                say(self.console, f"note: {note}")
        self._n_steps += 1
        left = engine.config.engine.max_steps - engine.global_step
        self._lower(id(engine.config), left, show=self._n_steps == 1)

    def tell(self, item: BatchItem) -> None:
        """Shows what became of an asset."""
        self._counts[item.status] = self._counts.get(item.status, 0) + 1
        if not self.quiet and item.status != "stopped":
            n_ended = sum(self._counts.values())
            error = f": {printable(item.error)}" if item.error else ""
            prompt = printable(item.config.prompt)
            say(self.console, f"[{n_ended}/{len(self._left)}] {item.status}: {prompt}{error}")
        if item.status != "stopped":
            self._lower(id(item.config), 0)

    def _lower(self, key: int, left: int, show: bool = False) -> None:
        """Takes in how many steps are left of an asset; shows it at every tenth of the batch."""
        before = self._total - sum(self._left.values())
        self._left[key] = left
        done = self._total - sum(self._left.values())
        if self.quiet or done == before:
            return
        if self.console.is_terminal:
            self._show_bar(done)
        elif show or done * PLAIN_LINES // self._total > before * PLAIN_LINES // self._total:
            text = f"step {done}/{self._total} of the batch  {self._note()}"
            if self._n_steps:
                took = (time.monotonic() - self._began) / self._n_steps
                text += f"  {format_seconds(took * (self._total - done))} left"
            say(self.console, text)

    def _show_bar(self, done: int) -> None:
        if self._bar is None:
            self._bar = _make_bar(self.console, "steps of the batch")
            self._task = self._bar.add_task("", total=self._total, completed=done, note="")
            self._bar.start()
        self._bar.update(self._task, completed=done, note=self._note())

    def _note(self) -> str:
        ended = ", ".join(f"{n} {status}" for status, n in self._counts.items())
        return f"{ended or '0 done'} of {len(self._left)}"


def _make_bar(console: Console, label: str) -> Progress:
    """A bar of steps, whose task has a field "note"."""
    return Progress(
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def format_seconds(seconds: float) -> str:
    """A duration such as "45 s", "12 min" or "2 h 5 min"."""
    if seconds < 100:
        return f"{max(seconds, 0.0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Stopped(KeyboardInterrupt):
    """A signal that came while no step was being done: loading, or writing results."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopOnSignal:
    """An engine callback that stops a run cleanly on SIGINT or SIGTERM.

    In the loop, the step in hand is finished and the engine asked to stop, so that a checkpoint
    gets written; elsewhere `Stopped` is raised at once. A second signal ends the process where it
    stands, which files.py makes safe.

    Args:
        also_in_last_step: stop there as well, since other runs are to follow; where False, such a
            run's results are written instead.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, also_in_last_step: bool = False) -> None:
        self.also_in_last_step = also_in_last_step
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self._before = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __call__(self, engine: Engine, metrics: StepMetrics) -> None:
        if self.signum is None:
            return
        if self.also_in_last_step or engine.global_step < engine.config.engine.max_steps:
            engine.request_stop()
        else:  # it was the last step: the results are as good as there
            self.signum = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            _say("\x1b[?25h" if sys.stderr.isatty() else "")  # the bar has hidden the cursor
            os._exit(128 + signum)
        if not _inside_loop(frame):
            raise Stopped(signum)
        self.signum = signum
        _say("\nsdi-fast: stopping after this step; once more to stop without saving it\n")


def _inside_loop(frame: FrameType | None) -> bool:
    """Whether the interrupted code was called by Engine.run."""
    while frame is not None:
        if frame.f_code is Engine.run.__code__:
            return True
        frame = frame.f_back
    return False


def _say(text: str) -> None:
    """Straight to stderr: a print inside a signal handler could meet its own lock."""
    if text:
        os.write(2, text.encode())
