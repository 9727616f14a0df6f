"""Dropping samples that cannot be seen (methods.md D, Marching)."""

from __future__ import annotations

from torch import Tensor

from ..reference.prune import prune as prune_reference
from ..types import Samples
from ._checks import check_positive, check_samples, check_tensor
from ._native import resolve_backend


def prune(
    samples: Samples,
    density: Tensor,  # [N] f32 or f64, 1/scene unit
    early_stop_eps: float,  # transmittance
    alpha_threshold: float,
    *,
    backend: str = "auto",
) -> Samples:
    """The samples with transmittance >= early_stop_eps and alpha >= alpha_threshold.

    No gradient.
    """
    check_tensor("density", density, (samples.n_samples,))
    check_samples(samples, density)
    check_positive("early_stop_eps", early_stop_eps, zero_ok=True)
    check_positive("alpha_threshold", alpha_threshold, zero_ok=True)
    resolve_backend("prune", density, backend, ())
    return prune_reference(samples, density, early_stop_eps, alpha_threshold)
