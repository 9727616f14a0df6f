"""pytest -p emulated_plugin: the ops run SDI_FAST_EMULATED, the module with emulated kernels.

The last line names the ops that ran.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from emulated_build import all_ops

# The CPU launchers check indices, the CUDA ones do not (csrc/cuda/dispatch.h).
CHECKED_ON_THE_CPU_ONLY = (
    "samples past the end",
    "samples before the start",
    "view without a light",
    "cell outside",
)

_called: set[str] = set()


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sdi_fast._C", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _watched(name: str, launcher: Callable[..., int]) -> Callable[..., int]:
    def run(*args: Any) -> int:
        _called.add(name)
        return launcher(*args)

    return run


def _install() -> None:
    module = _load(os.environ["SDI_FAST_EMULATED"])
    for name in all_ops():
        setattr(module, name, _watched(name, getattr(module, name)))
    sys.modules["sdi_fast._C"] = module


_install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = [i for i in items if any(f"[{case}]" in i.name for case in CHECKED_ON_THE_CPU_ONLY)]
    items[:] = [i for i in items if i not in unwanted]
    config.hook.pytest_deselected(items=unwanted)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"emulated: {' '.join(sorted(_called))}")
