"""The command line: sdi-fast generate, export, doctor.

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

if TYPE_CHECKING:
    from rich.console import Console

    from .config import Config

# In the help, "(default: None)" says less than nothing: texts name their defaults themselves.
_PLAIN = tyro.conf.arg(help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class Generate:
    """Make a 3D object from a description.

    Writes mesh.glb, turntable.mp4, preview_*.png, field.safetensors, config.yaml and metrics.json.
    Ctrl-C saves a checkpoint; --resume goes on from it.
    """

    prompt: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT", help_behavior_hint="")
    ] = ""
    """What to make, e.g. "a red mushroom". With --resume it may be left out."""
    out: Annotated[Path | None, _PLAIN] = None
    """Folder for the results (default: outputs/ and a name made from the prompt)."""
    model: Annotated[str | None, _PLAIN] = None
    """toyworld (bundled, small), a diffusers folder or a hub id (default: toyworld where no CUDA
    device is, else Stable Diffusion 2.1 base)."""
    steps: Annotated[int | None, _PLAIN] = None
    """Length of the run; all schedules follow it (default: 600 for toyworld, else 10000)."""
    seed: Annotated[int | None, _PLAIN] = None
    """Fixes every random draw (default: 0)."""
    size: Annotated[int | None, _PLAIN] = None
    """Side of the training images, pixels (default: 64 for toyworld, else 512)."""
    method: Annotated[Literal["sdi", "sds"] | None, _PLAIN] = None
    """Score distillation via inversion (default), or plain score distillation sampling."""
    variant: Annotated[Literal["threestudio", "paper"] | None, _PLAIN] = None
    """Which to follow where the official code (default) and the paper differ."""
    guidance_scale: Annotated[float | None, _PLAIN] = None
    """Classifier-free guidance scale (default: 7.5)."""
    denoiser: Annotated[Literal["diffusers", "fast", "auto"] | None, _PLAIN] = None
    """Whose UNet: diffusers' (default), ours on packed weights, or ours on a GPU where it can."""
    encoder: Annotated[Literal["diffusers", "fast", "auto"] | None, _PLAIN] = None
    """Whose VAE encoder, likewise."""
    static: Annotated[bool, _PLAIN] = False
    """SDI's target from fixed buffers, on a GPU as CUDA graphs; other noise than without."""
    speed: Annotated[Literal["exact", "balanced", "turbo"] | None, _PLAIN] = None
    """exact (default), or approximate inversions, with --static and what else they need; what they
    gain and lose is not measured yet."""
    device: Annotated[str | None, _PLAIN] = None
    """auto (default), cpu, cuda or cuda:N."""
    backend: Annotated[Literal["auto", "reference", "cpu", "cuda"] | None, _PLAIN] = None
    """Which kernels render: PyTorch (reference), C++ (cpu), CUDA, or the best there (auto)."""
    threads: Annotated[int | None, _PLAIN] = None
    """CPU threads."""
    deterministic: Annotated[bool, _PLAIN] = False
    """The same numbers in every run on this machine."""
    config: Annotated[Path | None, _PLAIN] = None
    """YAML file with settings, e.g. another run's config.yaml; options given here win over it."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="KEY=VALUE", help_behavior_hint=""),
    ] = ()
    """Any setting of config.yaml, e.g. --set camera.batch_size=2; may be repeated."""
    resume: Annotated[bool, _PLAIN] = False
    """Continue the run in --out from its last checkpoint."""
    overwrite: Annotated[bool, _PLAIN] = False
    """Replace the run in --out."""
    quiet: Annotated[bool, _PLAIN] = False
    """No progress."""

    def run(self, console: Console) -> int:
        """Runs it; the exit code."""
        from .api import generate
        from .progress import Reporter, StopOnSignal, Stopped

        with StopOnSignal() as stop, Reporter(console, quiet=self.quiet) as reporter:
            out: Path | None = None
            try:
                config, why = self.build_config()
                out = self.folder(config.prompt)
                _print(console, f"model: {config.model.id} ({why})")
                _print(console, f"prompt: {_printable(config.prompt)}")
                _print(console, f"output: {out}")
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
            _complain(note, "note")
        names = sorted(p.name for p in result.files if not p.name.startswith("preview_"))
        _print(console, f"done: {', '.join(names)} and previews in {result.out}")
        return 0

    def build_config(self) -> tuple[Config, str]:
        """The run's config and why it has its model: defaults, then file, then options."""
        from .api import base_config
        from .config_io import check_prompt, config_from_dict, read_yaml

        data = read_yaml(self.config) if self.config else self._settings_of_earlier_run()
        prompt = self.prompt or data.get("prompt") or ""
        check_prompt(prompt)
        options = self._options(prompt)
        model, why = self._choose_model(data, options)
        config = config_from_dict(data, base_config(prompt, model))
        return config_from_dict(options, config), why

    def folder(self, prompt: str) -> Path:
        """Where the run goes."""
        from .runs import OUTPUTS, prompt_slug

        return self.out if self.out is not None else OUTPUTS / prompt_slug(prompt)

    def _settings_of_earlier_run(self) -> dict[str, Any]:
        """The config.yaml that --resume continues, so that options need not be repeated."""
        from .config_io import read_yaml
        from .runs import CONFIG_NAME

        if not self.resume or (self.out is None and not self.prompt):
            return {}
        path = self.folder(self.prompt) / CONFIG_NAME
        return read_yaml(path) if path.is_file() else {}

    def _options(self, prompt: str) -> dict[str, Any]:
        """What was given on the command line, as a part of a config."""
        from .config import SPEEDS
        from .config_io import parse_assignment

        tree: dict[str, Any] = {"prompt": prompt}
        shortcuts = SPEEDS[self.speed or "exact"]
        needed = "fast" if shortcuts.deep_cache else None
        given: dict[str, dict[str, Any]] = {
            "model": {
                "id": self.model,
                "denoiser": self.denoiser or needed,
                "encoder": self.encoder,
            },
            "camera": {"height": self.size, "width": self.size},
            "guidance": {
                "method": self.method,
                "variant": self.variant,
                "guidance_scale": self.guidance_scale,
                "static": self.static or not shortcuts.exact or None,
                "speed": self.speed,
            },
            "engine": {
                "max_steps": self.steps,
                "seed": self.seed,
                "device": self.device,
                "backend": self.backend,
                "threads": self.threads,
                "deterministic": self.deterministic or None,
            },
        }
        for stage, settings in given.items():
            tree[stage] = {k: v for k, v in settings.items() if v is not None}
        for text in self.set:
            _merge(tree, parse_assignment(text))
        return tree

    def _choose_model(self, data: dict[str, Any], options: dict[str, Any]) -> tuple[str, str]:
        """The model's id and why it is that one."""
        import torch

        from .constants import BUNDLED_MODEL_ID, DEFAULT_MODEL_ID

        for source, why in ((options, "as asked for"), (data, "as in the settings")):
            model = source.get("model")
            if isinstance(model, dict) and "id" in model:
                return str(model["id"]), why
        engine = options.get("engine")
        device = engine.get("device") if isinstance(engine, dict) else None
        if device == "cpu":
            return BUNDLED_MODEL_ID, "bundled; the default on the CPU"
        if torch.cuda.is_available():
            return DEFAULT_MODEL_ID, "the default with a CUDA device"
        return BUNDLED_MODEL_ID, "bundled; the default without a CUDA device"


@dataclasses.dataclass(frozen=True)
class Export:
    """Make a mesh again from a finished run, in another format or finer."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    format: Annotated[Literal["glb", "ply", "obj"] | None, _PLAIN] = None
    """Format of the mesh (default: what --out ends in, else glb)."""
    resolution: Annotated[int | None, _PLAIN] = None
    """Cells along the longest side (default: the run's)."""
    threshold: Annotated[float | None, _PLAIN] = None
    """Density of the surface, 1/scene unit (default: the run's)."""
    out: Annotated[Path | None, _PLAIN] = None
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
            _complain(note, "note")
        n_vertices, n_faces = len(surface.vertices), len(surface.faces)
        _print(console, f"done: {path} ({n_vertices} vertices, {n_faces} faces)")
        return 0


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show what this installation has and what it lacks; exit code 1 if something needed does."""

    json: Annotated[bool, _PLAIN] = False
    """Print JSON instead of a table."""

    def run(self, console: Console) -> int:
        """Runs it; the exit code."""
        from .doctor import run_doctor

        return run_doctor(console, as_json=self.json)


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate", prefix_name=False)]
    | Annotated[Export, tyro.conf.subcommand("export", prefix_name=False)]
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
        warnings.showwarning = _show_warning
        try:
            return int(command.run(Console(highlight=False)))
        except SDIFastError as error:
            _complain(str(error), "error")
            return 2
        except (NonFiniteError, torch.OutOfMemoryError, OSError) as error:
            # diverged; too large for the GPU; disk full, no permission
            _complain(str(error), "error")
            return 1
        except KeyboardInterrupt:
            return 130


def _tell_stopped(signum: int, out: Path | None) -> int:
    """Says how to go on; the exit code."""
    from .checkpoint import list_checkpoints

    if out is not None and list_checkpoints(out):
        command = f"sdi-fast generate --resume --out {shlex.quote(str(out))}"
        _complain(f"resume with: {command}", "stopped")
    else:
        _complain("before the first checkpoint, so there is nothing to resume", "stopped")
    return 128 + signum


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Lays `other` over `tree`, mapping by mapping."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def _complain(text: str, kind: str) -> None:
    """One line on stderr."""
    print(f"sdi-fast: {kind}: {_printable(text)}", file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """`text` on one line, without anything that a terminal would obey."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if not issubclass(category, FutureWarning | DeprecationWarning):
        _complain(str(message), "warning")


if __name__ == "__main__":
    sys.exit(main())
