"""Marching through the occupancy grid (methods.md D, Marching).

Kernels: csrc/cpu/march.cpp, csrc/cuda/march.cu. The number of samples depends on the data, so that
the native path is a custom op with a dynamic size; a GPU is waited for once, to learn the size, and
no CUDA graph can capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.march import march as march_reference
from ..types import Samples, SDIFastError
from ._checks import check_positive, check_tensor
from ._native import call, resolve_backend


def march(
    origins: Tensor,  # [R, 3] f32 or f64, scene units
    directions: Tensor,  # [R, 3], unit length
    occupancy: Tensor,  # [G, G, G] bool, index (x, y, z)
    radius: float,  # scene units
    step_size: float,  # scene units
    near: float,  # scene units
    jitter: Tensor | None = None,  # [R], scene units, in [0, step_size)
    *,
    backend: str = "auto",
) -> Samples:
    """The intervals of length step_size whose midpoint lies in an occupied cell of the box.

    No gradient. One synchronisation with a GPU.
    """
    check_tensor("origins", origins, (None, 3))
    check_tensor("directions", directions, (origins.shape[0], 3), like=origins)
    check_tensor("occupancy", occupancy, (None, None, None), dtype=torch.bool, like=origins)
    if occupancy.numel() == 0 or len(set(occupancy.shape)) != 1:
        raise SDIFastError(
            f"occupancy: expected a cube [G, G, G] with G >= 1, got {list(occupancy.shape)}"
        )
    check_positive("radius", radius)
    check_positive("step_size", step_size)
    check_positive("near", near, zero_ok=True)
    if jitter is not None:
        check_tensor("jitter", jitter, (origins.shape[0],), like=origins)
    if resolve_backend("march", origins, backend, ("cpu", "cuda")) == "reference":
        return march_reference(origins, directions, occupancy, radius, step_size, near, jitter)
    with torch.no_grad():
        return Samples(
            *_march(
                origins, directions, occupancy, jitter, float(radius), float(step_size), float(near)
            )
        )


@torch.library.custom_op(
    "sdi_fast::march",
    mutates_args=(),
    schema="(Tensor origins, Tensor directions, Tensor occupancy, Tensor? jitter, float radius, "
    "float step_size, float near) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _march(
    origins: Tensor,
    directions: Tensor,
    occupancy: Tensor,
    jitter: Tensor | None,
    radius: float,
    step_size: float,
    near: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ray_indices [N], t_starts [N], t_ends [N], packed_info [R, 2]."""
    origins, directions = origins.contiguous(), directions.contiguous()
    occupancy = occupancy.contiguous()
    offsets = 0 if jitter is None else jitter.contiguous()
    n_rays = origins.shape[0]
    counts = origins.new_empty(n_rays, dtype=torch.int64)
    scene = (n_rays, origins, directions, offsets, occupancy, occupancy.shape[0])
    lengths = (radius, step_size, near)
    call("march_count", origins, *scene, *lengths, counts, 0, 0, 0, 0)
    first = counts.cumsum(0) - counts
    n = int(counts.sum())  # waits for a GPU
    ray_indices = origins.new_empty(n, dtype=torch.int64)
    t_starts, t_ends = origins.new_empty(n), origins.new_empty(n)
    call("march_fill", origins, *scene, *lengths, 0, first, ray_indices, t_starts, t_ends)
    return ray_indices, t_starts, t_ends, torch.stack([first, counts], dim=-1)


@_march.register_fake
def _(
    origins: Tensor,
    directions: Tensor,
    occupancy: Tensor,
    jitter: Tensor | None,
    radius: float,
    step_size: float,
    near: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    return (
        origins.new_empty(n, dtype=torch.int64),
        origins.new_empty(n),
        origins.new_empty(n),
        origins.new_empty((origins.shape[0], 2), dtype=torch.int64),
    )
