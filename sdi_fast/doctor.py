"""What this installation has and what it lacks: `sdi-fast doctor`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __version__

NEEDED = ("torch", "diffusers", "transformers", "safetensors", "numpy", "yaml", "tyro", "rich",
          "trimesh", "skimage", "PIL")  # fmt: skip
PEERS = {  # optional: what each is good for here
    "triton": "Triton kernels on CUDA",
    "nerfacc": "peer: sampler",
    "tinycudann": "peer: hash encoding",
    "xformers": "peer: attention",
    "viser": "viewer",
}
DISTRIBUTIONS = {"yaml": "PyYAML", "skimage": "scikit-image", "PIL": "pillow"}
STYLES = {"ok": "green", "missing": "yellow", "broken": "red"}


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "missing", "broken"]
    detail: str
    needed: bool  # whether nothing works without it


def run_doctor(console: Console, *, as_json: bool = False) -> int:
    """Prints the report; 1 if something needed is missing or broken, else 0."""
    checks = collect()
    bad = [c.name for c in checks if c.needed and c.status != "ok"]
    if as_json:
        report = {"ok": not bad, "checks": [dataclasses.asdict(c) for c in checks]}
        print(json.dumps(report, indent=2))
        return 1 if bad else 0
    verdict = f"needed and not working: {', '.join(bad)}" if bad else "everything needed is there"
    if console.is_terminal:
        console.print(_table(checks))
        console.print(verdict, markup=False)
    else:  # one line each, whole, for logs and grep
        for check in checks:
            print(f"{check.name}: {_state(check)}: {check.detail}")
        print(verdict)
    return 1 if bad else 0


def _table(checks: list[Check]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("what", "state", "detail"):
        table.add_column(title, overflow="fold")
    for check in checks:
        state = Text(_state(check), STYLES[check.status])
        table.add_row(Text(check.name), state, Text(check.detail))
    return table


def _state(check: Check) -> str:
    return check.status + (" (needed)" if check.needed and check.status != "ok" else "")


def collect() -> list[Check]:
    """All checks; none of them raises."""
    checks = [
        Check("sdi_fast", "ok", __version__, True),
        Check("python", "ok", f"{platform.python_version()} on {platform.platform()}", True),
        *(_module(name, needed=True) for name in NEEDED),
    ]
    probes: tuple[tuple[str, bool, Callable[[], Check]], ...] = (
        ("devices", False, _devices),
        ("backend reference", True, _backend_reference),
        ("backend cpu", False, _backend_cpu),
        ("backend cuda", False, _backend_cuda),
        ("bundled model", True, _bundled_model),
        ("ffmpeg", False, _ffmpeg),
    )
    checks += [_guarded(*probe) for probe in probes]
    checks += [_module(name, needed=False, what=what) for name, what in PEERS.items()]
    return checks


def _guarded(name: str, needed: bool, probe: Callable[[], Check]) -> Check:
    try:
        return probe()
    except Exception as error:  # whatever is broken is what we are here to report
        return Check(name, "broken", _reason(error), needed)


def _module(name: str, *, needed: bool, what: str = "") -> Check:
    """Whether a package is there and can be imported."""
    distribution = DISTRIBUTIONS.get(name, name)
    try:
        if importlib.util.find_spec(name) is None:
            return Check(name, "missing", what or f"pip install {distribution}", needed)
        importlib.import_module(name)
    except Exception as error:  # an extension that does not load may raise anything
        return Check(name, "broken", _reason(error), needed)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    return Check(name, "ok", f"{version} ({what})" if what else version, needed)


def _devices() -> Check:
    import torch

    found = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        info = torch.cuda.get_device_properties(i)
        gib, arch = info.total_memory / 2**30, f"sm_{info.major}{info.minor}"
        found.append(f"cuda:{i}: {info.name}, {gib:.0f} GiB, {arch}")
    if torch.cuda.is_available():
        found.append(f"torch built for CUDA {torch.version.cuda}")
    elif shutil.which("nvidia-smi"):
        return Check(
            "devices",
            "broken",
            "; ".join([*found, "nvidia-smi is here, but torch sees no GPU"]),
            False,
        )
    return Check("devices", "ok", "; ".join(found), False)


def _backend_reference() -> Check:
    """One op, run."""
    import torch

    from .ops.background import background

    weights = (torch.zeros(16, 9), torch.zeros(16, 16), torch.zeros(3, 16))
    color = background(torch.tensor([[0.0, 0.0, 1.0]]), *weights, backend="reference")
    works = bool(torch.allclose(color, torch.full((1, 3), 0.5)))
    detail = "PyTorch, any device" if works else "it computes wrong values"
    return Check("backend reference", "ok" if works else "broken", detail, True)


def _backend_cpu() -> Check:
    from .ops import _native

    if not _native.is_available():
        hint = "build it with `pip install .` in the source folder"
        return Check("backend cpu", "missing", f"{_native.reason_missing()}; {hint}", False)
    return Check("backend cpu", "ok", _built_with(_native.build_info()), False)


def _backend_cuda() -> Check:
    import torch

    from .ops import _native

    if not _native.is_available() or not _native.has_cuda():
        hint = "install where nvcc is found (SDI_FAST_CUDA=ON pip install .)"
        return Check("backend cuda", "missing", f"the extension has no CUDA kernels; {hint}", False)
    archs = _native.build_info().get("cuda_archs")
    if not torch.cuda.is_available():
        return Check("backend cuda", "missing", f"built for {archs}, but there is no GPU", False)
    return Check("backend cuda", "ok", f"built for {archs}", False)


def _built_with(info: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in info.items())


def _bundled_model() -> Check:
    from .config import ModelConfig
    from .constants import BUNDLED_MODEL_ID
    from .diffusion.source import BUNDLED_FOLDER, find_model
    from .types import SDIFastError

    if not BUNDLED_FOLDER.is_dir():
        return Check("bundled model", "missing", f"expected in {BUNDLED_FOLDER}", True)
    import torch

    try:
        folder = find_model(ModelConfig(id=BUNDLED_MODEL_ID), torch.float32)
    except SDIFastError as error:
        return Check("bundled model", "broken", str(error), True)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20
    return Check("bundled model", "ok", f"{BUNDLED_MODEL_ID}, {size:.1f} MiB", True)


def _ffmpeg() -> Check:
    from .media import find_ffmpeg

    path = find_ffmpeg()
    if path is None:
        return Check("ffmpeg", "missing", "turntables are GIFs; pip install imageio-ffmpeg", False)
    return Check("ffmpeg", "ok", path, False)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
