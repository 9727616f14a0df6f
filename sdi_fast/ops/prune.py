"""Dropping samples that cannot be seen (methods.md D, Marching).

Kernels: csrc/cpu/prune.cpp, csrc/cuda/prune.cu. How many stay depends on the data, so that the
native path is a custom op with a dynamic size; a GPU is waited for once, to learn the size, and no
CUDA graph can capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.prune import prune as prune_reference
from ..types import Samples
from ._checks import check_positive, check_samples, check_tensor
from ._native import call, resolve_backend


def prune(
    samples: Samples,
    density: Tensor,  # [N] f32 or f64, 1/scene unit
    early_stop_eps: float,  # transmittance
    alpha_threshold: float,
    *,
    backend: str = "auto",
) -> Samples:
    """The samples with transmittance >= early_stop_eps and alpha >= alpha_threshold.

    No gradient. One synchronisation with a GPU.
    """
    check_tensor("density", density, (samples.n_samples,))
    check_samples(samples, density)
    check_positive("early_stop_eps", early_stop_eps, zero_ok=True)
    check_positive("alpha_threshold", alpha_threshold, zero_ok=True)
    if resolve_backend("prune", density, backend, ("cpu", "cuda")) == "reference":
        return prune_reference(samples, density, early_stop_eps, alpha_threshold)
    with torch.no_grad():
        return Samples(
            *_prune(
                density,
                samples.t_starts,
                samples.t_ends,
                samples.packed_info,
                float(early_stop_eps),
                float(alpha_threshold),
            )
        )


@torch.library.custom_op(
    "sdi_fast::prune",
    mutates_args=(),
    schema="(Tensor density, Tensor t_starts, Tensor t_ends, Tensor packed_info, "
    "float early_stop_eps, float alpha_threshold) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _prune(
    density: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    packed_info: Tensor,
    early_stop_eps: float,
    alpha_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ray_indices [K], t_starts [K], t_ends [K], packed_info [R, 2] of the K samples kept."""
    density, packed_info = density.contiguous(), packed_info.contiguous()
    t_starts, t_ends = t_starts.contiguous(), t_ends.contiguous()
    n, n_rays = density.shape[0], packed_info.shape[0]
    counts = packed_info.new_empty(n_rays)
    keep = density.new_zeros(n, dtype=torch.uint8)
    given = (n, n_rays, density, t_starts, t_ends, packed_info, keep)
    limits, name = (early_stop_eps, alpha_threshold), "samples.packed_info"
    call("prune_count", density, *given, counts, 0, 0, 0, 0, *limits, indices=name)
    first = counts.cumsum(0) - counts
    n_kept = int(counts.sum())  # waits for a GPU
    ray_indices = packed_info.new_empty(n_kept)
    kept = (ray_indices, density.new_empty(n_kept), density.new_empty(n_kept))
    call("prune_fill", density, *given, counts, first, *kept, *limits)
    return (*kept, torch.stack([first, counts], dim=-1))


@_prune.register_fake
def _(
    density: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    packed_info: Tensor,
    early_stop_eps: float,
    alpha_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    return (
        density.new_empty(n, dtype=torch.int64),
        density.new_empty(n),
        density.new_empty(n),
        packed_info.new_empty(packed_info.shape),
    )
