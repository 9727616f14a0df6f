"""Files that are whole or not there: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

TEMP_MARK = ".tmp-"  # hidden, and named so that a later run can sweep what a kill left behind


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its suffix, that becomes `path` when the block ends.

    A kill between any two system calls leaves either the old `path` or the new one. When the
    block raises, the temporary file is removed and `path` stays as it was.
    """
    temp = path.with_name(f"{TEMP_MARK}{os.getpid()}-{path.name}")
    try:
        yield temp
        _fsync(temp)
        os.replace(temp, path)
        fsync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text through `atomic_path`."""
    with atomic_path(path) as temp:
        temp.write_text(text, encoding="utf-8")


def sweep_temporary(folder: Path) -> None:
    """Removes the temporary files of killed runs; call with the folder's lock held."""
    for path in folder.glob(f"{TEMP_MARK}*"):
        if path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Makes a rename durable; without effect where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
