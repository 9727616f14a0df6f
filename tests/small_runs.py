"""Whole runs with the tiny model of tiny_sd.py, at sizes that take seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import CHILD_CWD

from sdi_fast.api import base_config
from sdi_fast.config import Config
from sdi_fast.config_io import config_from_dict, merge, parse_assignment

SMALL = [
    "camera.height=16", "camera.width=16", "render.n_samples_per_ray=32", "field.n_levels=3",
    "field.log2_hashmap_size=8", "field.base_resolution=4", "field.start_level=2",
    "field.hidden=8", "export.turntable_frames=2", "export.turntable_size=16",
    "export.preview_size=16", "export.preview_views=1", "export.mesh_resolution=12",
    "guidance.inversion_n_steps=2",
]  # fmt: skip
SMALL_OPTIONS = tuple(word for setting in SMALL for word in ("--set", setting))


def small_run(tiny: Path, *more: str, command: str = "generate") -> list[str]:
    """The arguments of a run that takes some 10 ms a step."""
    return [command, "--model", str(tiny), *SMALL_OPTIONS, *more]


def small_config(tiny: Path, prompt: str, steps: int = 4, *more: str) -> Config:
    """The config of such a run on the CPU."""
    tree: dict[str, Any] = {"engine": {"max_steps": steps, "device": "cpu"}}
    for text in (*SMALL, *more):
        merge(tree, parse_assignment(text))
    return config_from_dict(tree, base_config(prompt, str(tiny)))


def small_auto_config(tiny: Path, *more: str) -> Config:
    """The same of the model's own length, on whatever device there is."""
    config = base_config("a mug", str(tiny))
    for setting in (*SMALL, *more):
        config = config_from_dict(parse_assignment(setting), config)
    return config


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "sdi_fast.cli", *arguments],
        cwd=CHILD_CWD,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Until `ready()` while the process runs."""
    deadline = time.monotonic() + 90
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
