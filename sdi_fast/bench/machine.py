"""What a measured number has to stand beside."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..ops import _native


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, GPU (`device`, if it is one; else the current one), versions, threads."""
    where = device if device is not None and device.type == "cuda" else None
    gpu = torch.cuda.get_device_name(where) if torch.cuda.is_available() else ""
    native = _native.build_info()
    if native.get("openmp_runtime"):  # which one, not where this machine keeps it
        native["openmp_runtime"] = Path(native["openmp_runtime"]).name
    return {
        "cpu": cpu_name(),
        "gpu": gpu,
        "driver": _driver() if gpu else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "native": native,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def output_of(*command: str, cwd: Path | None = None) -> str:
    """What `command` prints; nothing where it fails."""
    try:
        run = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def _driver() -> str:
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
