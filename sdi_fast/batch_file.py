"""The file of `sdi-fast batch`: a prompt a line, or a YAML list with settings of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .config_io import MAX_CONFIG_BYTES, check_prompt, merge, nest
from .types import SDIFastError

STDIN = "-"
YAML_SUFFIXES = (".yaml", ".yml")
KEYS = ("prompt", "out", "seed", "set")


@dataclass(frozen=True)
class Entry:
    """One asset to make."""

    where: str  # "prompts.txt, line 3", for messages
    prompt: str
    out: str | None = None  # its folder, below that of the batch
    settings: dict[str, Any] = field(default_factory=dict)  # a part of a config


def read_batch(file: str) -> list[Entry]:
    """The entries of a file, or of stdin (as text) for "-".

    In text, blank lines and those that start with # are passed over. In YAML (by the file's
    ending) an item is a prompt, or {prompt: ..., out: ..., seed: ..., set: {key: value}}.

    Raises:
        SDIFastError: naming the file, and the line where there is one to name.
    """
    name = "standard input" if file == STDIN else file
    data = _read(file, name)
    is_yaml = file != STDIN and Path(file).suffix.lower() in YAML_SUFFIXES
    entries = list(_from_yaml(data, name) if is_yaml else _from_text(data, name))
    if not entries:
        raise SDIFastError(f"{name}: expected at least one prompt, got none")
    return entries


def _read(file: str, name: str) -> bytes:
    try:
        if file == STDIN:
            data = sys.stdin.buffer.read(MAX_CONFIG_BYTES + 1)
        else:
            with open(file, "rb") as stream:
                data = stream.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SDIFastError(f"batch: {name} cannot be read: {why}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise SDIFastError(f"batch: expected a file of at most 1 MiB, got {name}")
    return data.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8


def _from_text(data: bytes, name: str) -> Iterator[Entry]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SDIFastError(f"{where}: expected UTF-8 text, got other bytes") from error
        if text and not text.startswith("#"):
            yield Entry(where, check_prompt(text, f"{where}: prompt"))


def _from_yaml(data: bytes, name: str) -> Iterator[Entry]:
    try:
        root = yaml.compose(data, Loader=yaml.SafeLoader)
        items = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise SDIFastError(f"batch: {name} is not valid YAML: {why}") from error
    if not isinstance(root, yaml.SequenceNode) or not isinstance(items, list):
        raise SDIFastError(f"batch: expected a list in {name}, got {type(items).__name__}")
    for node, item in zip(root.value, items, strict=True):
        where = f"{name}, line {node.start_mark.line + 1}"
        yield _entry(item if isinstance(item, dict) else {"prompt": item}, where)


def _entry(item: dict[Any, Any], where: str) -> Entry:
    for key in item:
        if key not in KEYS:
            raise SDIFastError(
                f"{where}: {str(key)[:60]!r}: no such key; known: {', '.join(KEYS)} (a prompt "
                "with a colon in it needs quotes)"
            )
    prompt = check_prompt(item.get("prompt", ""), f"{where}: prompt")
    out, settings = item.get("out"), item.get("set", {})
    if out is not None and (not isinstance(out, str) or not out.strip()):
        raise SDIFastError(f"{where}: out: expected the name of a folder, got {str(out)[:60]!r}")
    if not isinstance(settings, dict):
        raise SDIFastError(f"{where}: set: expected a mapping, got {type(settings).__name__}")
    tree: dict[str, Any] = {"engine": {"seed": item["seed"]}} if "seed" in item else {}
    for key, value in settings.items():
        if key == "prompt":
            raise SDIFastError(f"{where}: set: expected no prompt, which has a key of its own")
        merge(tree, nest(str(key), value))
    return Entry(where, prompt, out, tree)
