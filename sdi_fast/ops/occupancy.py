"""The occupancy grid's update (methods.md D, Marching).

Kernels: csrc/cpu/occupancy.cpp, csrc/cuda/occupancy.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.occupancy import update_occupancy as update_occupancy_reference
from ..types import SDIFastError
from ._checks import check_positive, check_tensor
from ._native import call, extension, resolve_backend


def update_occupancy(
    occs: Tensor,  # [G^3] f32 or f64, density * dt; written in place
    cells: Tensor,  # [M] i64, index (x * G + y) * G + z, duplicates allowed
    values: Tensor,  # [M], density * dt, >= 0
    decay: float,  # in [0, 1]
    threshold: float,  # density * dt
    *,
    backend: str = "auto",
) -> Tensor:
    """occs <- max(decay * occs, values) at `cells`; returns occs > min(mean, threshold).

    The result is [G, G, G] bool. A cell given more than once decays once and takes its largest
    value; NaN counts as the largest, and stays. No gradient.

    Raises:
        SDIFastError: for tensors that do not fit each other, numbers out of range, and, on the CPU,
            a cell outside the grid. The GPU passes over such a cell: finding it would need a
            synchronisation.
    """
    check_tensor("occs", occs, (None,))
    side = round(occs.numel() ** (1 / 3))
    if side < 1 or side**3 != occs.numel():
        raise SDIFastError(f"occs: expected G^3 entries, got {occs.numel()}")
    if not occs.is_contiguous():
        raise SDIFastError("occs: expected a contiguous tensor, since it is written in place")
    check_tensor("cells", cells, (None,), dtype=torch.int64, like=occs)
    check_tensor("values", values, (cells.shape[0],), like=occs)
    check_positive("decay", decay, zero_ok=True)
    check_positive("threshold", threshold, zero_ok=True)
    if resolve_backend("update_occupancy", occs, backend, ("cpu", "cuda")) == "reference":
        return update_occupancy_reference(occs, cells, values, decay, threshold)
    with torch.no_grad():
        return _update(occs, cells, values, side, float(decay), float(threshold))


@torch.library.custom_op(
    "sdi_fast::update_occupancy",
    mutates_args=("occs",),
    schema="(Tensor(a!) occs, Tensor cells, Tensor values, int side, float decay, float threshold)"
    " -> Tensor",
)
def _update(
    occs: Tensor, cells: Tensor, values: Tensor, side: int, decay: float, threshold: float
) -> Tensor:
    cells, values = cells.contiguous(), values.contiguous()
    occupied = occs.new_empty((side, side, side), dtype=torch.bool)
    # both untouched by the CPU's kernel
    largest = occs.new_zeros(occs.numel(), dtype=torch.int64)
    partial_sums = occs.new_empty(extension().OCCUPANCY_MAX_BLOCKS, dtype=torch.float64)
    sizes = (occs.numel(), cells.numel())
    arrays = (occs, cells, values, occupied, largest, partial_sums)
    call("occupancy_update", occs, *sizes, *arrays, decay, threshold, indices="cells")
    return occupied


@_update.register_fake
def _(
    occs: Tensor, cells: Tensor, values: Tensor, side: int, decay: float, threshold: float
) -> Tensor:
    return occs.new_empty((side, side, side), dtype=torch.bool)
