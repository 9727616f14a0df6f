"""Checkpoints: one safetensors file each, with a SHA-256 of its contents in its own metadata.

Everything is in a single file that is renamed into place (files.py), so that a kill at any moment
leaves whole files only; the hash finds what the disk or a copy did to them afterwards. The hash
covers names, dtypes, shapes, bytes and the other metadata.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import __version__
from .config import Config, config_to_dict
from .files import atomic_path, fsync_folder
from .readback import Snapshot
from .types import SDIFastError

FORMAT = "sdi_fast.checkpoint.1"
N_KEPT = 2  # the newest, and one to fall back to
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{6,})\.safetensors")

# Keys of the config that do not change what a run computes, so may differ on resume.
FREE_KEYS = ("export.", "engine.checkpoint_every", "engine.threads", "model.local_files_only")
# Keys that others follow from, so that the refusal names the cause and not an effect.
TOLD_FIRST = ("prompt", "model.id", "engine.max_steps")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    step: int
    tensors: dict[str, Tensor]  # on the CPU
    metadata: dict[str, str]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` (number of steps done) belongs."""
    return folder / f"checkpoint-{step:06d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest step first."""
    found = [(CHECKPOINT_NAME.fullmatch(p.name), p) for p in folder.glob("checkpoint-*")]
    return [p for _, p in sorted((int(m[1]), p) for m, p in found if m)]


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a checkpoint durably; the file at `path` is replaced in one system call.

    Args:
        path: its final name; the folder has to exist.
        tensors: any dtypes, devices and strides.
        metadata: text to be kept with it; "format", "version" and "sha256" are ours.
    """
    plain = _plain_tensors(tensors)
    metadata = {**metadata, "format": FORMAT, "version": __version__}
    metadata["sha256"] = _digest(plain, metadata)
    with atomic_path(path) as temp:
        # not save_file: it renames a temporary file of its own, which a kill leaves behind
        temp.write_bytes(save(plain, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint.

    Raises:
        SDIFastError: "checkpoint ... is corrupted: ..." for anything but a whole, unchanged file.
    """
    tensors: dict[str, Tensor] = {}
    if not path.is_file():
        raise SDIFastError(f"checkpoint {path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _corrupted(path, str(error)) from error
    if metadata.get("format") != FORMAT:
        raise _corrupted(path, f"not in the format {FORMAT}")
    if metadata.get("sha256") != _digest(tensors, metadata):
        raise _corrupted(path, "its contents do not have the SHA-256 that was stored with them")
    step = metadata.get("step", "")
    if not step.isdecimal():
        raise _corrupted(path, "it does not say its step")
    return Checkpoint(path, int(step), tensors, metadata)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest good checkpoint, or None where there is none at all.

    A damaged one is passed over with a warning that names it.

    Raises:
        SDIFastError: when there are checkpoints but none of them is good.
    """
    paths = list_checkpoints(folder)
    problems: list[SDIFastError] = []
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path)
        except SDIFastError as error:
            problems.append(error)
            continue
        for problem in problems:
            warnings.warn(f"{problem}; using {path.name} instead", stacklevel=2)
        return checkpoint
    if problems:
        others = f" (and {len(problems) - 1} older ones too)" if len(problems) > 1 else ""
        raise SDIFastError(f"{problems[0]}{others}") from problems[0]
    return None


def prune_checkpoints(folder: Path, newest: int, keep: int = N_KEPT) -> None:
    """Removes all but the `keep` newest checkpoints up to step `newest`.

    Later ones go too: a run that resumed from an older checkpoint, because the newer ones were
    damaged, has overtaken them.
    """
    paths = list_checkpoints(folder)
    kept = [p for p in paths if _step_of(p) <= newest][-keep:]
    for path in paths:
        if path not in kept:
            path.unlink(missing_ok=True)
    fsync_folder(folder)


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], config: Config
) -> Path:
    """Saves the checkpoint of `step` with its config, then prunes the older ones."""
    path = checkpoint_path(folder, step)
    metadata = {"step": str(step), "config": json.dumps(config_to_dict(config))}
    save_checkpoint(path, tensors, metadata)
    prune_checkpoints(folder, step)
    return path


class CheckpointWriter:
    """Writes a run's checkpoints one after the other, on a GPU beside the loop.

    Args:
        threaded: write in a thread: the loop goes on while the state is on its way from the GPU,
            is hashed and written. An error of a write is raised by the next call.

    The snapshot is let go of by the caller's thread, in the next call: pinned memory that is freed
    records an event on the stream that it was copied on, which may be in a capture meanwhile.
    """

    def __init__(self, folder: Path, config: Config, *, threaded: bool) -> None:
        self.folder, self.config = folder, config
        self._pool = ThreadPoolExecutor(1, "checkpoint") if threaded else None
        self._last: Future[None] | None = None
        self._snapshot: Snapshot | None = None  # that of `_last`
        self.step = 0  # of the last one written

    def save(self, step: int, snapshot: Snapshot, *, in_bad_streak: bool) -> None:
        """Begins to write the state that `step` steps have led to; waits for the one before.

        Args:
            in_bad_streak: also where the last steps were not finite. Left out, the checkpoint
                before stays the last one, and one to go back to.
        """
        self.wait()
        if self._pool is None:
            self._write(step, snapshot, in_bad_streak)
        else:  # not as an argument, which the thread would hold on to
            self._snapshot = snapshot
            self._last = self._pool.submit(self._write_snapshot, step, in_bad_streak)

    def wait(self) -> None:
        """Until everything is written."""
        last = self._last
        if last is not None:
            wait_for([last])  # where this is interrupted, the next call waits again
            self._last = self._snapshot = None
            last.result()

    def _write_snapshot(self, step: int, in_bad_streak: bool) -> None:
        assert self._snapshot is not None
        self._write(step, self._snapshot, in_bad_streak)

    def _write(self, step: int, snapshot: Snapshot, in_bad_streak: bool) -> None:
        tensors = snapshot.tensors()
        if in_bad_streak or not int(tensors["engine.bad_steps"]):
            write_checkpoint(self.folder, step, tensors, self.config)
            self.step = step


def check_same_run(config: Config, checkpoint: Checkpoint) -> None:
    """Raises SDIFastError, naming the first key, unless `config` continues the checkpoint's run.

    Only `FREE_KEYS` may differ. max_steps may not: the schedules depend on it.
    """
    try:
        theirs = _flat(json.loads(checkpoint.metadata["config"]))
    except (KeyError, ValueError, AttributeError) as error:
        raise _corrupted(checkpoint.path, "its config cannot be read") from error
    _check_same(config, theirs, checkpoint.path.parent)


def check_same_config(config: Config, other: Config, folder: Path) -> None:
    """Likewise, for the config `other` of the run in `folder`."""
    _check_same(config, _flat_config(other), folder)


def _check_same(config: Config, theirs: dict[str, object], folder: Path) -> None:
    ours = _flat_config(config)
    for key in dict.fromkeys([*TOLD_FIRST, *ours, *theirs]):
        mine, other = ours.get(key, "(no such key)"), theirs.get(key, "(no such key)")
        if mine != other and not key.startswith(FREE_KEYS):
            raise SDIFastError(
                f"{key}: the run in {folder} has {_short(other)}, this one asks "
                f"for {_short(mine)}; resume with the same settings or take another --out"
            )


def _plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata (but for the hash itself), names, dtypes, shapes and bytes."""
    hasher = hashlib.sha256()
    head = {
        "metadata": {k: v for k, v in metadata.items() if k != "sha256"},
        "tensors": {k: [str(t.dtype), list(t.shape)] for k, t in tensors.items()},
    }
    hasher.update(json.dumps(head, sort_keys=True).encode())
    for name in sorted(tensors):
        data = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        hasher.update(data.numpy().data)
    return hasher.hexdigest()


def _step_of(path: Path) -> int:
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _corrupted(path: Path, why: str) -> SDIFastError:
    return SDIFastError(f"checkpoint {path} is corrupted: {' '.join(why.split())}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Dotted keys to plain values."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flat_config(config: Config) -> dict[str, object]:
    """A config as it reads in a checkpoint."""
    return _flat(json.loads(json.dumps(config_to_dict(config))))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
