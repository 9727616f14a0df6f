"""The folder of a run: its name, its lock, what is written into it and how it is cleared.

The prompt reaches the file system only through `prompt_slug`: letters, digits, dashes and a hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .checkpoint import CHECKPOINT_NAME, check_same_config, list_checkpoints
from .config import Config
from .config_io import config_from_yaml, config_to_yaml
from .constants import SLUG_CHARS
from .files import TEMP_MARK, sweep_temporary, write_text
from .types import SDIFastError

OUTPUTS = Path("outputs")  # where runs without --out go, below the working folder
LOCK_NAME = ".lock"
CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.json"
MAX_HISTORY = 500  # points of the loss history in metrics.json
_HASH_CHARS = 8

# Every file that a run or an export writes; --overwrite removes these and nothing else.
_OUR_FILES = re.compile(
    r"config\.yaml|metrics\.json|field\.safetensors|mesh\.(glb|ply|obj)|turntable\.(mp4|gif)"
    r"|preview_\d{2,}_(color|normal|depth)\.png"
)


def prompt_slug(prompt: str) -> str:
    """A folder name for `prompt`: [a-z0-9-], 1 to SLUG_CHARS long, distinct by a hash.

    The hash keeps names apart that differ only in dropped characters, and Windows' reserved names
    harmless.
    """
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARS]
    head = prompt[: 4 * SLUG_CHARS]
    ascii_text = unicodedata.normalize("NFKD", head).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")
    words = words[: SLUG_CHARS - _HASH_CHARS - 1].strip("-")
    return f"{words or 'prompt'}-{digest}"


def is_ours(name: str) -> bool:
    """Whether a run writes a file of this name (lock and temporary files excluded)."""
    return bool(_OUR_FILES.fullmatch(name) or CHECKPOINT_NAME.fullmatch(name))


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, with its lock held. Get one from `open_run`."""

    path: Path
    resume: bool
    overwrite: bool

    def start(self, config: Config) -> None:
        """Clears what an earlier run left, if --overwrite was given, and writes config.yaml.

        Call it when everything that can be refused has been checked, so that a mistyped model
        does not cost the earlier result.
        """
        sweep_temporary(self.path)
        if self.overwrite:
            for entry in self.path.iterdir():
                if is_ours(entry.name) and (entry.is_file() or entry.is_symlink()):
                    entry.unlink()
        write_text(self.path / CONFIG_NAME, config_to_yaml(config))

    def write_metrics(self, metrics: Mapping[str, Any]) -> Path:
        """Writes metrics.json; numbers that are not finite become null."""
        return write_json(self.path / METRICS_NAME, metrics)


@contextlib.contextmanager
def open_run(
    out: Path | str | None, prompt: str, *, resume: bool = False, overwrite: bool = False
) -> Iterator[RunFolder]:
    """Makes and locks a run's folder, without touching what is in it.

    Args:
        out: the folder; None: outputs/<slug of the prompt>.
        resume: an existing run there is to be continued.
        overwrite: an existing run there is to be replaced (`RunFolder.start` does it).

    Raises:
        SDIFastError: for a folder that is not empty where neither was asked for, that cannot be
            written, or that another process is writing.
    """
    if resume and overwrite:
        raise SDIFastError("resume, overwrite: expected at most one of the two, got both")
    if out is not None and not str(out).strip():
        raise SDIFastError("out: expected a folder, got nothing")
    path = OUTPUTS / prompt_slug(prompt) if out is None else Path(out)
    check_vacant(path, resume=resume, overwrite=overwrite)
    is_new = not path.exists()
    make_folder(path)
    with _locked(path):
        check_vacant(path, resume=resume, overwrite=overwrite)  # now that nobody else writes
        try:
            yield RunFolder(path, resume, overwrite)
        except BaseException:
            if is_new and [p.name for p in path.iterdir()] == [LOCK_NAME]:
                (path / LOCK_NAME).unlink()  # nothing was written: leave no trace
                path.rmdir()
            raise


def make_folder(path: Path) -> None:
    """Makes a folder for results and those above it; raises SDIFastError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null character
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SDIFastError(f"out: the folder {_shown(path)} cannot be made: {why}") from error


def is_finished(path: Path, config: Config) -> bool:
    """Whether the folder holds all results of a run of `config`.

    Raises:
        SDIFastError: where they are another config's, or that config cannot be read.
    """
    if not (path / METRICS_NAME).is_file() or not (path / CONFIG_NAME).is_file():
        return False
    check_same_config(config, config_from_yaml(path / CONFIG_NAME), path)
    return True


def check_vacant(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises SDIFastError if `path` is no folder, or not empty without resume or overwrite."""
    try:
        if not path.exists():
            return
        if not path.is_dir():
            raise SDIFastError(f"out: expected a folder, got a file at {_shown(path)}")
        names = [p.name for p in path.iterdir()]
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SDIFastError(f"out: {_shown(path)} cannot be read: {why}") from error
    filled = [n for n in names if n != LOCK_NAME and not n.startswith(TEMP_MARK)]
    if filled and resume and not any(map(is_ours, filled)):
        raise SDIFastError(f"out: {_shown(path)} holds other files and no run to resume")
    if filled and not (resume or overwrite):
        hint = "--resume continues it, --overwrite" if list_checkpoints(path) else "--overwrite"
        raise SDIFastError(f"out: {_shown(path)} exists and is not empty; {hint} replaces it")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on the folder; the system drops it when the process dies."""
    if sys.platform == "win32":  # no fcntl there; two writers then are the user's to avoid
        yield
        return
    import fcntl

    lock = folder / LOCK_NAME
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise SDIFastError(f"out: {_shown(folder)} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(handle)
        raise SDIFastError(
            f"out: {_shown(folder)} is being written by another process ({owner})"
        ) from error
    except OSError as error:  # a file system without locks
        warnings.warn(f"{_shown(folder)} cannot be locked: {error.strerror}", stacklevel=2)
    if not lock.exists() or lock.stat().st_ino != os.fstat(handle).st_ino:
        os.close(handle)  # its owner failed and removed it between our two calls
        raise SDIFastError(f"out: {_shown(folder)} was just removed by another process; try again")
    try:
        os.truncate(handle, 0)
        os.write(handle, f"pid {os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)  # the file stays: another process may have opened it meanwhile


# ---- metrics.json -------------------------------------------------------------------------------


def build_metrics(
    config: Config,
    history: Sequence[Mapping[str, float]],
    *,
    seconds: float,
    device: torch.device,
    scores: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    ran: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What metrics.json says of a run.

    Args:
        history: one row of numbers a step.
        seconds: wall time of this process's part of the optimisation; "seconds_in_steps" has
            the steps that were resumed as well.
        scores: evaluation scores, if any were computed.
        notes: what the user should know, e.g. that there was no surface to mesh.
        ran: `Engine.ran`: which of the possible implementations computed.
    """
    rows = [{"step": i, **row} for i, row in enumerate(history)]
    return {
        "prompt": config.prompt,
        "model": config.model.id,
        "method": config.guidance.method,
        "variant": config.guidance.variant,
        "ran": dict(ran or {}),
        "seed": config.engine.seed,
        "steps": len(rows),
        "skipped_steps": sum(bool(row.get("skipped")) for row in rows),
        "seconds": seconds,
        "seconds_in_steps": sum(float(row.get("seconds", 0.0)) for row in rows),
        "final": rows[-1] if rows else None,
        "scores": dict(scores or {}),
        "notes": list(notes),
        "device": _device_name(device),
        "peak_memory_mib": _peak_memory(device),
        "versions": versions(),
        "history": thin(rows),
    }


def write_json(path: Path, data: Mapping[str, Any]) -> Path:
    """Writes a JSON file whole or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")
    return path


def thin(rows: Sequence[Any], n: int = MAX_HISTORY) -> list[Any]:
    """At most `n` of `rows`, evenly spaced, the first and the last among them."""
    if len(rows) <= n:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (n - 1))] for i in range(n)]


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    found = {"sdi_fast": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "triton", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {platform.machine()}, {torch.get_num_threads()} threads"


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Peak of this process in MiB, on the host and on the GPU where one is used."""
    peak: dict[str, float] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON does not know, as None."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _shown(path: Path) -> str:
    """A path for a message: one line, bounded."""
    text = str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
