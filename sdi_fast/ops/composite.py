"""Volume rendering sums along rays (methods.md D, Compositing)."""

from __future__ import annotations

from torch import Tensor

from ..reference.composite import composite as composite_reference
from ..types import Composited, Samples
from ._checks import check_samples, check_tensor
from ._native import resolve_backend


def composite(
    density: Tensor,  # [N] f32 or f64, 1/scene unit, >= 0
    rgb: Tensor,  # [N, 3]
    normal: Tensor,  # [N, 3], unit length, world frame
    samples: Samples,
    directions: Tensor,  # [R, 3], unit length
    *,
    backend: str = "auto",
) -> Composited:
    """Sums over each ray's samples. Gradients: density, rgb, normal; none through `weights`."""
    check_tensor("density", density, (samples.n_samples,))
    check_samples(samples, density)
    check_tensor("rgb", rgb, (samples.n_samples, 3), like=density)
    check_tensor("normal", normal, (samples.n_samples, 3), like=density)
    check_tensor("directions", directions, (samples.packed_info.shape[0], 3), like=density)
    resolve_backend("composite", density, backend, ())
    return composite_reference(density, rgb, normal, samples, directions)
