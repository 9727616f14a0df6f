"""The command line: sdi-fast generate, batch, export, bench, doctor.

Exit codes: 0 done, 1 failed, 2 bad input (one line on stderr), 130 and 143 stopped by a signal.
torch is imported only when a command runs, so that --help and --version are quick.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from . import __version__
from .cli_batch import BatchCommand
from .cli_options import PLAIN, RunOptions
from .cli_text import complain, printable, say, show_warning

if TYPE_CHECKING:
    from rich.console import Console

    from .config import Config


@dataclasses.dataclass(frozen=True)
class Generate(RunOptions):
    """Make a 3D object from a description.

    Writes mesh.glb, turntable.mp4, preview_*.png, field.safetensors, config.yaml and metrics.json.
    Ctrl-C saves a checkpoint; --resume goes on from it.
    """

    prompt: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT", help_behavior_hint="")
    ] = ""
    """What to make, e.g. "a red mushroom". With --resume it may be left out."""
    out: Annotated[Path | None, PLAIN] = None
    """Folder for the results (default: outputs/ and a name made from the prompt)."""

    def run(self, console: Console) -> int:
        """Runs it; the exit code."""
        from .api import generate
        from .progress import Reporter, StopOnSignal, Stopped

        with StopOnSignal() as stop, Reporter(console, quiet=self.quiet) as reporter:
            out: Path | None = None
            try:
                config, why = self.build_config()
                out = self.folder(config.prompt)
                say(console, f"model: {config.model.id} ({why})")
                say(console, f"prompt: {printable(config.prompt)}")
                say(console, f"output: {out}")
                result = generate(
                    config,
                    out=out,
                    resume=self.resume,
                    overwrite=self.overwrite,
                    callbacks=[reporter, stop],
                )
            except Stopped as stopped:
                reporter.close()
                return _tell_stopped(stopped.signum, out)
        if not result.completed:
            return _tell_stopped(stop.signum or 2, result.out)
        for note in result.metrics.get("notes", []):
            complain(note, "note")
        names = sorted(p.name for p in result.files if not p.name.startswith("preview_"))
        say(console, f"done: {', '.join(names)} and previews in {result.out}")
        return 0

    def build_config(self) -> tuple[Config, str]:
        """The run's config and why it has its model."""
        folder = self.folder(self.prompt) if self.out is not None or self.prompt else None
        return self.config_for(self.prompt, folder)

    def folder(self, prompt: str) -> Path:
        """Where the run goes."""
        from .runs import OUTPUTS, prompt_slug

        return self.out if self.out is not None else OUTPUTS / prompt_slug(prompt)


@dataclasses.dataclass(frozen=True)
class Export:
    """Make a mesh again from a finished run, in another format or finer."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    format: Annotated[Literal["glb", "ply", "obj"] | None, PLAIN] = None
    """Format of the mesh (default: what --out ends in, else glb)."""
    resolution: Annotated[int | None, PLAIN] = None
    """Cells along the longest side (default: the run's)."""
    threshold: Annotated[float | None, PLAIN] = None
    """Density of the surface, 1/scene unit (default: the run's)."""
    out: Annotated[Path | None, PLAIN] = None
    """The file (default: mesh.FORMAT in the run's folder)."""

    def run(self, console: Console) -> int:
        """Runs it; the exit code."""
        from .export import export_run

        path, surface, notes = export_run(
            self.run_dir,
            format=self.format,
            resolution=self.resolution,
            threshold=self.threshold,
            out=self.out,
        )
        for note in notes:
            complain(note, "note")
        n_vertices, n_faces = len(surface.vertices), len(surface.faces)
        say(console, f"done: {path} ({n_vertices} vertices, {n_faces} faces)")
        return 0


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show what this installation has and what it lacks; exit code 1 if something needed does."""

    json: Annotated[bool, PLAIN] = False
    """Print JSON instead of a table."""

    def run(self, console: Console) -> int:
        """Runs it; the exit code."""
        from .doctor import run_doctor

        return run_doctor(console, as_json=self.json)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure how long a step takes on this device, beside stored results of others.

    On a GPU with Stable Diffusion 2.1's size and random weights, elsewhere with the bundled model.
    """

    speed: Literal["exact", "balanced", "turbo"] = "exact"
    """What generate's --speed would be."""
    quick: bool = False
    """Few rounds; without a GPU also a tiny scene, which says little."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Annotated[bool, PLAIN] = False
    """Print JSON instead of a table."""

    def run(self, console: Console) -> int:
        """Runs it; the exit code."""
        from .bench.command import run_bench

        return run_bench(
            console, speed=self.speed, quick=self.quick, as_json=self.json, device=self.device
        )


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate", prefix_name=False)]
    | Annotated[BatchCommand, tyro.conf.subcommand("batch", prefix_name=False)]
    | Annotated[Export, tyro.conf.subcommand("export", prefix_name=False)]
    | Annotated[Bench, tyro.conf.subcommand("bench", prefix_name=False)]
    | Annotated[Doctor, tyro.conf.subcommand("doctor", prefix_name=False)]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (argument errors exit with 2 by themselves)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):  # a prompt may hold what the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if list(arguments) in (["--version"], ["-V"]):
        print(f"sdi-fast {__version__}")
        return 0
    command = tyro.cli(
        Command,
        args=arguments,
        prog="sdi-fast",
        description="Text to 3D by score distillation via inversion. --version says which one.",
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )
    return _run(command)


def _run(command: Any) -> int:
    """Runs a command; bad input and known failures become one line and an exit code."""
    import torch
    from rich.console import Console

    from .engine import NonFiniteError
    from .types import SDIFastError

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            return int(command.run(Console(highlight=False)))
        except SDIFastError as error:
            complain(str(error), "error")
            return 2
        except (NonFiniteError, torch.OutOfMemoryError, OSError) as error:
            # diverged; too large for the GPU; disk full, no permission
            complain(str(error), "error")
            return 1
        except KeyboardInterrupt:
            return 130


def _tell_stopped(signum: int, out: Path | None) -> int:
    """Says how to go on; the exit code."""
    from .checkpoint import list_checkpoints

    if out is not None and list_checkpoints(out):
        command = f"sdi-fast generate --resume --out {shlex.quote(str(out))}"
        complain(f"resume with: {command}", "stopped")
    else:
        complain("before the first checkpoint, so there is nothing to resume", "stopped")
    return 128 + signum


if __name__ == "__main__":
    sys.exit(main())
