"""The field as PyTorch's mixed precision computes it: what the fused f16 kernels are judged by.

Table, activations and weights are rounded to f16 and the linear layers run in f16 (with f32 sums
inside, as cuBLAS has them); positions, interpolation, blob and activations at the end are f32.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from sdi_fast.constants import NORMALIZE_EPS
from sdi_fast.reference.field import _blob, _blob_gradient, _unit
from sdi_fast.reference.hash_encode import hash_encode_with_jacobian
from sdi_fast.types import FieldParams, FieldSpec

# by name, since the package's attribute of this name is the function
_TWIN = importlib.import_module("sdi_fast.reference.render_views")


def _linear(x: Tensor, w: Tensor) -> Tensor:
    """x w^T of f16 numbers, summed in f32, rounded to f16."""
    return F.linear(x.float(), w.half().float()).half()


def half_field(
    x: Tensor, params: FieldParams, spec: FieldSpec, active_levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    features, jacobian = hash_encode_with_jacobian(
        _unit(x, spec), params.table.half().float(), spec.grid, active_levels
    )
    features = features.half()
    # f16 cannot hold the slopes of fine levels by position, only those inside a cell
    scales = jacobian.new_tensor(spec.grid.scales).repeat_interleave(spec.grid.n_features)
    jacobian = (jacobian / scales[:, None]).half()
    hidden = _linear(features, params.density_w1)
    logit = _linear(F.relu(hidden), params.density_w2)[:, 0].float()
    color = _linear(F.relu(_linear(features, params.color_w1)), params.color_w2)
    through_relu = (hidden > 0).half() * params.density_w2.half()
    slope = _linear(through_relu, params.density_w1.T)
    gradient = (slope[..., None].float() * jacobian.float() * scales[:, None]).sum(dim=1)
    gradient = gradient / (2.0 * spec.radius) + _blob_gradient(x, spec)
    normal = -F.normalize(gradient, dim=-1, eps=NORMALIZE_EPS)
    return F.softplus(logit + _blob(x, spec)), torch.sigmoid(color.float()), normal


@contextmanager
def half_precision() -> Iterator[None]:
    """The twin of render_views evaluates its field in f16 inside."""

    def density(*args: object) -> Tensor:
        return half_field(*args)[0]  # type: ignore[arg-type]

    with mock.patch.multiple(_TWIN, field=half_field, density=density):
        yield
