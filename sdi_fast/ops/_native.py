"""Backends: the only importer of the C++ extension `sdi_fast._C`, and who runs an op.

The extension is torch-free: it takes raw pointers as integers. It is loaded at the first call that
asks for it, and why it could not be loaded is kept for `sdi-fast doctor`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..types import FieldSpec, HashGridSpec, SDIFastError

_ON_GPU = 2  # csrc/bindings.cpp kOnGpu
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
    """The backend that runs `op` on `tensor`: "reference", "cpu", "cuda" or "triton".

    `native` lists the backends other than "reference" that the op has code for, those to prefer
    first; a name that cannot be had is an error. "auto" takes the first that is there and made for
    the tensor's device.
    """
    device = tensor.device.type
    if backend == "reference":
        return backend
    if backend == "auto":
        return next((name for name in native if _serves(name, device)), "reference")
    if backend not in ("cpu", "cuda", "triton"):
        raise SDIFastError(
            f'backend: expected "auto", "reference", "cpu", "cuda" or "triton", got {backend!r}'
        )
    if backend not in native:
        raise SDIFastError(
            f'backend: {op} has no "{backend}" kernel yet; use "reference" or "auto"'
        )
    if backend == "triton":
        _check_triton(device)
        return backend
    if device != backend:
        raise SDIFastError(f'backend: "{backend}" takes {backend} tensors, got {device} ones')
    extension()
    if backend == "cuda" and not has_cuda():
        raise SDIFastError(
            'backend: "cuda" needs an extension built with nvcc; '
            "run `SDI_FAST_CUDA=ON pip install .` in the source folder"
        )
    return backend


def use_triton(op: str, tensor: Tensor, backend: str) -> bool:
    """Whether `op`, which has Triton kernels and a twin, runs `tensor` on the former."""
    return resolve_backend(op, tensor, backend, ("triton",)) == "triton"


def _serves(backend: str, device: str) -> bool:
    """Whether "auto" may choose `backend` for tensors on `device`."""
    if backend == "triton":
        return device == "cuda" and has_triton()
    return device == backend and (has_cuda() if backend == "cuda" else is_available())


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def _check_triton(device: str) -> None:
    """Raise SDIFastError unless Triton is there and runs on such tensors."""
    if not has_triton():
        raise SDIFastError('backend: "triton" needs Triton; run `pip install triton`')
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SDIFastError(
            f'backend: "triton" takes cuda tensors (others with TRITON_INTERPRET=1), got {device} '
            "ones"
        )


def n_threads() -> int:
    """Threads of a CPU op: torch's own setting, so that the two never oversubscribe."""
    return torch.get_num_threads()


def call(op: str, tensor: Tensor, *args: Any, indices: str = "") -> None:
    """Run the extension's launcher `op` on `tensor`'s device and in its precision.

    Tensors pass as addresses, None as the null one; on a GPU the op is queued on the current
    stream. `indices` names the argument whose entries the CPU launcher checks against their array.
    """
    mode = int(tensor.dtype == torch.float64)
    raw = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args]
    launcher = getattr(extension(), op)
    if not tensor.is_cuda:
        check_status(op, launcher(mode, *raw, n_threads()), indices)
        return
    with torch.cuda.device(tensor.device):
        queue = torch.cuda.current_stream().cuda_stream
        check_status(op, launcher(mode | _ON_GPU, *raw, queue), indices)


def check_status(op: str, status: int, indices: str = "") -> None:
    """Raise what a launcher's status (csrc/status.h) stands for."""
    if status == 0:
        return
    if status == 1 and not indices:
        raise SDIFastError(f"{op}: expected sizes that fit its kernels, got larger ones")
    if status == 1:
        raise SDIFastError(f"{indices}: expected indices inside their array, got one outside")
    reason = {2: "out of memory", 3: "the CUDA launch failed"}.get(status, f"status {status}")
    raise RuntimeError(f"{op}: {reason}")


GridNumbers = tuple[float, ...]  # a HashGridSpec's or FieldSpec's members, as custom ops take them


def grid_numbers(spec: HashGridSpec) -> GridNumbers:
    return (
        float(spec.n_levels),
        float(spec.n_features),
        float(spec.log2_hashmap_size),
        float(spec.base_resolution),
        float(spec.per_level_scale),
    )


def field_numbers(spec: FieldSpec) -> GridNumbers:
    return (
        *grid_numbers(spec.grid),
        float(spec.radius),
        float(spec.blob_scale),
        float(spec.blob_std),
        float(spec.hidden),
    )


@functools.lru_cache(maxsize=64)
def native_grid(numbers: GridNumbers) -> Any:
    """The extension's GridSpec of `grid_numbers(spec)`."""
    spec = HashGridSpec(*map(int, numbers[:4]), per_level_scale=numbers[4])  # type: ignore[misc]
    return extension().GridSpec(
        spec.n_features,
        list(spec.scales),
        list(spec.resolutions),
        list(spec.level_offsets),
        list(spec.level_is_dense),
    )


@functools.lru_cache(maxsize=256)
def native_field(numbers: GridNumbers, active_levels: int) -> Any:
    """The extension's FieldSpec of `field_numbers(spec)`."""
    grid = native_grid(numbers[:5])
    return extension().FieldSpec(grid, *numbers[5:8], int(numbers[8]), active_levels)
