"""Rays through pixel centres (methods.md D, Rays)."""

from __future__ import annotations

from torch import Tensor

from ..reference.rays import generate_rays as generate_rays_reference
from ..types import SDIFastError
from ._checks import check_tensor
from ._native import resolve_backend


def generate_rays(
    c2w: Tensor,  # [B, 3, 4], columns right, up, -look, position
    fovy: Tensor,  # [B], rad
    height: int,  # pixels
    width: int,  # pixels
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Origins [R, 3] (scene units) and unit directions [R, 3]; R = B * height * width.

    Every backend runs the PyTorch twin: it is too cheap for a kernel.
    """
    check_tensor("c2w", c2w, (None, 3, 4))
    check_tensor("fovy", fovy, (c2w.shape[0],), like=c2w)
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1:
            raise SDIFastError(f"{name}: expected an int of at least 1, got {value!r}")
    resolve_backend("generate_rays", c2w, backend, ("cpu", "cuda"))
    return generate_rays_reference(c2w, fovy, height, width)
