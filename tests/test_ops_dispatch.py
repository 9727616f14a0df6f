"""What all ops share: backends by name, bad arguments, torch.library's own checks, determinism."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_cases import (
    F64,
    as_tuple,
    field_inputs,
    outputs_and_grads,
    rand,
    randn,
    random_samples,
)
from torch import Tensor

from sdi_fast.ops import _native
from sdi_fast.ops import adam as adam_module
from sdi_fast.ops import background as background_module
from sdi_fast.ops import composite as composite_module
from sdi_fast.ops import convexity as convexity_module
from sdi_fast.ops import field as field_module
from sdi_fast.ops import hash_encode as hash_encode_module
from sdi_fast.ops import march as march_module
from sdi_fast.ops import occupancy as occupancy_module
from sdi_fast.ops import prune as prune_module
from sdi_fast.ops import ray_losses as ray_losses_module
from sdi_fast.ops import shade as shade_module
from sdi_fast.ops.adam import adam_step
from sdi_fast.ops.background import background
from sdi_fast.ops.composite import composite
from sdi_fast.ops.convexity import convexity_loss
from sdi_fast.ops.field import density, field
from sdi_fast.ops.hash_encode import hash_encode
from sdi_fast.ops.march import march
from sdi_fast.ops.occupancy import update_occupancy
from sdi_fast.ops.prune import prune
from sdi_fast.ops.ray_losses import ray_losses
from sdi_fast.ops.rays import generate_rays
from sdi_fast.ops.shade import shade
from sdi_fast.types import FieldParams, FieldSpec, HashGridSpec, SDIFastError

SPEC = FieldSpec(HashGridSpec(3, 2, 7, 4, 1.6), hidden=20)


def _opcheck_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, params = field_inputs(SPEC, 20, 3, torch.float32)
    tensors = (x, *params.tensors())
    numbers = (list(_native.field_numbers(SPEC)), 3)
    samples = random_samples((4, 0, 6), dtype=torch.float32)
    n = samples.n_samples
    sums = (
        torch.rand(n),
        torch.rand(n, 3, requires_grad=True),
        torch.randn(n, 3, requires_grad=True),
        samples.t_starts,
        samples.t_ends,
        samples.packed_info,
        torch.randn(3, 3),
    )
    views = torch.zeros(20, dtype=torch.int64)
    weights = [
        randn(*s, dtype=torch.float32).requires_grad_() for s in ((16, 9), (16, 16), (3, 16))
    ]
    colours = (rand(20, 3, dtype=torch.float32).requires_grad_(), x.clone().requires_grad_())
    grid = list(_native.grid_numbers(SPEC.grid))
    state = tuple(torch.rand(30) for _ in range(4))
    return {
        "hash_encode": (
            hash_encode_module._forward,
            (torch.rand(20, 3, requires_grad=True), params.table, grid, 3),
        ),
        "density": (field_module._density, (*(t.detach() for t in tensors), *numbers)),
        "field": (field_module._forward, (*tensors, *numbers)),
        "shade": (shade_module._forward, (*colours, x, torch.randn(1, 3), views, 2)),
        "composite": (composite_module._forward, (*sums, False)),
        "background": (background_module._forward, (x, *weights)),
        "convexity": (
            convexity_module._forward,
            (torch.rand(1, 9, 9, 3, requires_grad=True), None, None),
        ),
        "convexity in the camera's frame": (
            convexity_module._forward,
            (
                torch.rand(2, 9, 9, 3, requires_grad=True),
                torch.rand(2, 9, 9, 1, requires_grad=True),
                torch.randn(2, 3, 4),
            ),
        ),
        "ray losses": (
            ray_losses_module._forward,
            tuple(torch.rand(20, requires_grad=True) for _ in range(3)),
        ),
        "march": (
            march_module._march,
            (x, x, torch.ones(4, 4, 4, dtype=torch.bool), None, 2.0, 0.1, 0.0),
        ),
        "prune": (
            prune_module._prune,
            (sums[0], samples.t_starts, samples.t_ends, samples.packed_info, 1e-4, 0.01),
        ),
        "occupancy": (
            occupancy_module._update,
            (torch.rand(64), torch.arange(9), torch.rand(9), 4, 0.95, 0.01),
        ),
        "adam": (
            adam_module._step,
            (*state, None, None, None, None, 1, [1e-2, 0.9, 0.99, 1e-15]),
        ),
        "adam of tensors": (
            adam_module._step,
            (
                *state,
                state[0].half(),
                torch.tensor(3),
                torch.tensor(1e-2, dtype=F64),
                torch.tensor(False),
                0,
                [0.0, 0.9, 0.99, 1e-15],
            ),
        ),
    }


@pytest.mark.parametrize("name", list(_opcheck_cases()))
def test_opcheck(name: str) -> None:
    operator, args = _opcheck_cases()[name]
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("n_threads", [2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(n_threads: int) -> None:
    def run() -> list[Tensor]:
        x, params = field_inputs(SPEC, 9000, 3, torch.float32)
        outputs, grads = outputs_and_grads(
            lambda: field(x, params, SPEC, 3, backend="cpu"), params.tensors()
        )
        u, table = rand(9000, 3, dtype=torch.float32), params.table
        encoded, table_grads = outputs_and_grads(
            lambda: hash_encode(u, table, SPEC.grid, 3, backend="cpu"), (table,)
        )
        weights = [
            randn(*s, dtype=torch.float32).requires_grad_() for s in ((16, 9), (16, 16), (3, 16))
        ]
        sky, sky_grads = outputs_and_grads(lambda: background(x, *weights, backend="cpu"), weights)
        images = [rand(9000, seed=i, dtype=torch.float32).requires_grad_() for i in range(3)]
        losses, image_grads = outputs_and_grads(lambda: ray_losses(*images, backend="cpu"), images)
        parts = (outputs, grads, encoded, table_grads, sky, sky_grads, losses, image_grads)
        return [tensor for part in parts for tensor in part]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(n_threads)
        together = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_auto_takes_the_extension_on_the_cpu() -> None:
    x, params = field_inputs(SPEC, 50, 3, torch.float32)
    chosen = [density(x, params, SPEC, 3, backend=b) for b in ("auto", "cpu")]
    assert torch.equal(*chosen)


def test_missing_extension_falls_back_or_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "_load", lambda: (None, "No module named 'sdi_fast._C'"))
    x, params = field_inputs(SPEC, 5, 3)
    assert torch.equal(
        density(x, params, SPEC, 3), density(x, params, SPEC, 3, backend="reference")
    )
    with pytest.raises(SDIFastError, match=r"backend: .*sdi_fast\._C.*pip install"):
        density(x, params, SPEC, 3, backend="cpu")


def test_unknown_and_unavailable_backends() -> None:
    x, params = field_inputs(SPEC, 5, 3)
    with pytest.raises(SDIFastError, match='backend: expected "auto"'):
        density(x, params, SPEC, 3, backend="tpu")
    with pytest.raises(SDIFastError, match='backend: density has no "triton" kernel yet'):
        density(x, params, SPEC, 3, backend="triton")
    with pytest.raises(SDIFastError, match='backend: "cuda" takes cuda tensors, got cpu ones'):
        density(x, params, SPEC, 3, backend="cuda")
    with pytest.raises(SDIFastError, match='backend: "cuda" takes cuda tensors, got cpu ones'):
        background(x, rand(16, 9), rand(16, 16), rand(3, 16), backend="cuda")


def test_triton_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    normals = rand(1, 9, 9, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SDIFastError, match='backend: "triton" takes cuda tensors .*, got cpu ones'):
        convexity_loss(normals, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SDIFastError, match='backend: convexity_loss has no "triton" kernel'):
        convexity_loss(normals, normals[..., :1], rand(1, 3, 4), backend="triton")
    monkeypatch.setattr(_native, "has_triton", lambda: False)
    with pytest.raises(SDIFastError, match='backend: "triton" needs Triton; run `pip install'):
        convexity_loss(normals, backend="triton")


def _bad_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    """What the message has to say, and the call."""
    x, params = field_inputs(SPEC, 5, 3)
    samples = random_samples((2, 3))
    five, unit = rand(5), randn(2, 3)
    cube = torch.ones(4, 4, 4, dtype=torch.bool)
    views = torch.zeros(5, dtype=torch.int64)
    short = FieldParams(params.table[:-1], *params.tensors()[1:])
    single = FieldParams(*(t.float() for t in params.tensors()))
    past_end = dataclasses.replace(samples, packed_info=torch.tensor([[0, 2], [2, 4]]))
    negative = dataclasses.replace(samples, packed_info=torch.tensor([[-1, 2], [2, 3]]))
    adam = [rand(6) for _ in range(4)]
    rates = (1, 1e-2, (0.9, 0.99), 1e-15)
    normals = rand(1, 4, 4, 3)
    return {
        "list for tensor": (
            "x_world: expected a tensor .* got list",
            lambda: density([[0.0, 0.0, 0.0]], params, SPEC, 3),  # type: ignore[arg-type]
        ),
        "points in 2D": (
            r"x_world: expected shape \[\*, 3\], got \[5, 2\]",
            lambda: field(x[:, :2], params, SPEC, 3),
        ),
        "half precision": (
            "x: expected dtype float32 or float64, got float16",
            lambda: hash_encode(x.half(), params.table, SPEC.grid, 3),
        ),
        "short table": ("table: expected shape", lambda: field(x, short, SPEC, 3)),
        "mixed dtypes": (
            "table: expected dtype float64, got float32",
            lambda: field(x, single, SPEC, 3),
        ),
        "too many levels": (
            "active_levels: expected an int in 0 to 3, got 4",
            lambda: density(x, params, SPEC, 4),
        ),
        "no levels at all": (
            "spec.n_levels: expected 1 to 32, got 33",
            lambda: hash_encode(x, params.table, HashGridSpec(33, 2, 5, 4, 1.1), 3),
        ),
        "wide network": (
            "spec.hidden: expected 1 to 256, got 300",
            lambda: field(x, params, dataclasses.replace(SPEC, hidden=300), 3),
        ),
        "step of zero": (
            "step_size: expected a finite number > 0, got 0",
            lambda: march(unit, unit, cube, 2.0, 0, 0.0),
        ),
        "occupancy of bytes": (
            "occupancy: expected dtype bool, got uint8",
            lambda: march(unit, unit, cube.byte(), 2.0, 0.1, 0.0),
        ),
        "box, no cube": (
            r"occupancy: expected a cube .* got \[4, 4, 2\]",
            lambda: march(unit, unit, cube[..., :2], 2.0, 0.1, 0.0),
        ),
        "jitter per sample": (
            r"jitter: expected shape \[2\], got \[5\]",
            lambda: march(unit, unit, cube, 2.0, 0.1, 0.0, five),
        ),
        "nan threshold": (
            "alpha_threshold: expected a finite number >= 0, got nan",
            lambda: prune(samples, five, 1e-4, float("nan")),
        ),
        "samples past the end": (
            "samples.packed_info: expected indices inside",
            lambda: prune(past_end, five, 1e-4, 0.01, backend="cpu"),
        ),
        "samples before the start": (
            "samples.packed_info: expected indices inside",
            lambda: composite(five, x, x, negative, unit, backend="cpu"),
        ),
        "rays missing": (
            r"directions: expected shape \[2, 3\], got \[1, 3\]",
            lambda: composite(five, x, x, samples, unit[:1]),
        ),
        "unknown shading": (
            "shading: expected one of albedo, .* got 'phong'",
            lambda: shade(x, x, x, unit, views, "phong"),
        ),
        "view without a light": (
            "view_indices: expected indices inside",
            lambda: shade(x, x, x, unit, views + 2, "diffuse", backend="cpu"),
        ),
        "small background": (
            r"w2: expected shape \[16, 16\], got \[16, 9\]",
            lambda: background(x, rand(16, 9), rand(16, 9), rand(3, 16)),
        ),
        "no pixels": (
            "normals: expected at least one pixel",
            lambda: convexity_loss(torch.empty(0, 4, 4, 3)),
        ),
        "opacity without a camera": (
            "opacity, c2w: expected both or neither",
            lambda: convexity_loss(normals, normals[..., :1]),
        ),
        "opacity without its dimension": (
            r"opacity: expected shape \[1, 4, 4, 1\], got \[1, 4, 4\]",
            lambda: convexity_loss(normals, normals[..., 0], rand(1, 3, 4)),
        ),
        "one camera too many": (
            r"c2w: expected shape \[1, 3, 4\], got \[2, 3, 4\]",
            lambda: convexity_loss(normals, normals[..., :1], rand(2, 3, 4)),
        ),
        "image for rays": (
            r"opacity: expected shape \[\*\], got \[1, 4, 4\]",
            lambda: ray_losses(normals[..., 0], five, five),
        ),
        "rays without variance": (
            r"z_variance: expected shape \[5\], got \[2\]",
            lambda: ray_losses(five, five, rand(2)),
        ),
        "cell outside": (
            "cells: expected indices inside",
            lambda: update_occupancy(rand(8), views + 8, five, 0.9, 0.1, backend="cpu"),
        ),
        "grid of nine cells": (
            r"occs: expected G\^3 entries, got 9",
            lambda: update_occupancy(rand(9), views, five, 0.9, 0.1),
        ),
        "step from zero": (
            "step: expected an int of at least 1, got 0",
            lambda: adam_step(*adam, 0, 1e-2, (0.9, 0.99), 1e-15),
        ),
        "strided moment": (
            "exp_avg: expected a contiguous tensor",
            lambda: adam_step(
                adam[0], adam[1], rand(12)[::2], adam[3], 1, 1e-2, (0.9, 0.99), 1e-15
            ),
        ),
        "step of floats": (
            "step: expected dtype int64, got float32",
            lambda: adam_step(*adam, torch.tensor(1.0), *rates[1:]),
        ),
        "rate in single precision": (
            "lr: expected dtype float64, got float32",
            lambda: adam_step(*adam, 1, torch.tensor(1e-2), *rates[2:]),
        ),
        "shadow of floats": (
            "shadow: expected dtype float16, got float32",
            lambda: adam_step(*adam, *rates, shadow=torch.zeros(6)),
        ),
        "one flag a parameter": (
            r"skip: expected shape \[\], got \[6\]",
            lambda: adam_step(*adam, *rates, skip=torch.zeros(6, dtype=torch.bool)),
        ),
        "beta of one": (
            "betas: expected two numbers",
            lambda: adam_step(*adam, 1, 1e-2, (0.9, 1.0), 1e-15),
        ),
        "image without rows": (
            "height: expected an int of at least 1, got 0",
            lambda: generate_rays(rand(1, 3, 4), rand(1), 0, 4),
        ),
    }


@pytest.mark.parametrize("name", list(_bad_calls()))
def test_bad_arguments_name_themselves_in_one_line(name: str) -> None:
    message, call = _bad_calls()[name]
    with pytest.raises(SDIFastError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_non_contiguous_inputs_give_the_same() -> None:
    x, params = field_inputs(SPEC, 40, 3)
    strided = x.t().contiguous().t()
    turned = FieldParams(
        torch.stack([params.table] * 2, dim=-1)[:, 0],
        *(t.t().contiguous().t() for t in params.tensors()[1:]),
    )
    assert not strided.is_contiguous() and not turned.density_w1.is_contiguous()
    ours, twin = (field(*args, SPEC, 3, backend="cpu") for args in ((strided, turned), (x, params)))
    assert all(torch.equal(a, b) for a, b in zip(ours, twin, strict=True))
    cotangent = torch.ones((), dtype=F64).expand(40)  # strides of zero
    (grad,) = torch.autograd.grad(ours[0], params.density_w2, cotangent)
    (plain,) = torch.autograd.grad(twin[0].sum(), params.density_w2)
    torch.testing.assert_close(grad, plain)


def test_march_of_strided_rays() -> None:
    origins, directions = randn(2, 9, 3)
    cube = rand(4, 4, 4) > 0.3
    turned = (origins.t().contiguous().t(), directions.t().contiguous().t(), cube.transpose(0, 2))
    plain = (origins, directions, cube.transpose(0, 2).contiguous())
    both = [march(*a, 2.0, 0.1, 0.0, backend="cpu") for a in (turned, plain)]
    assert both[0].n_samples > 0
    assert all(torch.equal(a, b) for a, b in zip(*map(as_tuple, both), strict=True))
