"""What a run leaves to the device: which one, whose kernels, fixed buffers or not."""

from __future__ import annotations

import dataclasses

import torch

from .config import Config, GuidanceConfig
from .render import may_fuse
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


def choose_backend(config: Config, device: torch.device) -> str:
    """The ops' backend. In deterministic mode "auto" means on a GPU our kernels where the fused
    renderer takes the field, since its gradients repeat, and PyTorch elsewhere: our single ops add
    the table's gradients in whatever order their blocks come."""
    engine = config.engine
    if not engine.deterministic or device.type != "cuda" or engine.backend != "auto":
        return engine.backend
    is_fused = may_fuse(config.render, "cuda", config.field.spec(), device)
    return "cuda" if is_fused else "reference"


def settle_guidance(config: GuidanceConfig, device: torch.device) -> GuidanceConfig:
    """`config` with what it leaves to the device decided: fixed buffers and graphs on a GPU, and
    wherever an approximation needs them."""
    if config.static is not None:
        return config
    static = config.method == "sdi" and (device.type == "cuda" or not config.shortcuts.exact)
    return dataclasses.replace(config, static=static)
