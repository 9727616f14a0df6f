"""What a run leaves to the device: which one, whose kernels, fixed buffers or not."""

from __future__ import annotations

import dataclasses

import torch

from .config import EngineConfig, GuidanceConfig
from .types import SDIFastError


def resolve_device(name: str) -> torch.device:
    """`name` as a device; "auto" prefers CUDA. Raises SDIFastError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SDIFastError(
            f'device: expected "auto", "cpu", "cuda" or "cuda:N", got {name!r}'
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise SDIFastError(f'device: expected "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SDIFastError(
            f"device: {name!r} is not there; this machine has "
            f"{torch.cuda.device_count()} CUDA device(s)"
        )
    return device


def choose_backend(config: EngineConfig, device: torch.device) -> str:
    """The ops' backend. In deterministic mode "auto" means PyTorch on a GPU: our single ops add the
    table's gradients in whatever order their blocks come. "cuda", asked for by name, has a fused
    renderer whose gradients repeat (ops.render_views), and nothing else where it does not fit."""
    if config.deterministic and device.type == "cuda" and config.backend == "auto":
        return "reference"
    return config.backend


def settle_guidance(config: GuidanceConfig, device: torch.device) -> GuidanceConfig:
    """`config` with what it leaves to the device decided: fixed buffers and graphs on a GPU, and
    wherever an approximation needs them."""
    if config.static is not None:
        return config
    static = config.method == "sdi" and (device.type == "cuda" or not config.shortcuts.exact)
    return dataclasses.replace(config, static=static)
