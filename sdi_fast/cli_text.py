"""What the commands say: lines on stdout, complaints on stderr, nothing that drives a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, text: str) -> None:
    """Text on stdout, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def complain(text: str, kind: str) -> None:
    """One line on stderr."""
    print(f"sdi-fast: {kind}: {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` on one line, without anything that a terminal would obey."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    """For `warnings.showwarning`."""
    if not issubclass(category, FutureWarning | DeprecationWarning):
        complain(str(message), "warning")
