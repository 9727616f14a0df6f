"""The only importer of the C++ extension `sdi_fast._C`.

The extension is torch-free: it takes raw pointers as integers. It is loaded at the first call that
asks for it, and why it could not be loaded is kept for `sdi-fast doctor`.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..types import SDIFastError

_HOW_TO_BUILD = "run `pip install .` in the source folder (needs a C++17 compiler)"


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason."""
    try:
        return importlib.import_module("sdi_fast._C"), ""
    except ImportError as error:
        return None, str(error).splitlines()[0]


def is_available() -> bool:
    """Whether the C++ extension can be imported."""
    return _load()[0] is not None


def has_cuda() -> bool:
    """Whether the extension was built with CUDA kernels."""
    module = _load()[0]
    return module is not None and bool(module.build_info()["cuda_archs"])


def reason_missing() -> str:
    """Why the extension is missing; empty when it is there."""
    return _load()[1]


def build_info() -> dict[str, Any]:
    """What the extension was built with, for `sdi-fast doctor`; empty when it is missing."""
    module = _load()[0]
    return {} if module is None else dict(module.build_info())


def extension() -> Any:
    """The extension module; SDIFastError says how to get it when it is missing."""
    module, reason = _load()
    if module is None:
        raise SDIFastError(
            f'backend: "cpu" needs the C++ extension sdi_fast._C, which is missing ({reason}); '
            f"{_HOW_TO_BUILD}"
        )
    return module


def resolve_backend(op: str, tensor: Tensor, backend: str, native: tuple[str, ...]) -> str:
    """The backend that runs `op` on `tensor`: "reference", "cpu" or "cuda".

    `native` lists the backends other than "reference" that the op has code for. "auto" takes the
    native one of the tensor's device when it is there; a name that cannot be had is an error.
    """
    device = tensor.device.type
    if backend == "reference":
        return backend
    if backend == "auto":
        if device in native and (has_cuda() if device == "cuda" else is_available()):
            return device
        return "reference"
    if backend not in ("cpu", "cuda"):
        raise SDIFastError(
            f'backend: expected "auto", "reference", "cpu" or "cuda", got {backend!r}'
        )
    if backend not in native:
        raise SDIFastError(
            f'backend: {op} has no "{backend}" kernel yet; use "reference" or "auto"'
        )
    if device != backend:
        raise SDIFastError(f'backend: "{backend}" takes {backend} tensors, got {device} ones')
    extension()
    if backend == "cuda" and not has_cuda():
        raise SDIFastError(
            'backend: "cuda" needs an extension built with nvcc; '
            "run `SDI_FAST_CUDA=ON pip install .` in the source folder"
        )
    return backend


def n_threads() -> int:
    """Threads of a CPU op: torch's own setting, so that the two never oversubscribe."""
    return torch.get_num_threads()
