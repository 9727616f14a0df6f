"""C++ kernels of shading, compositing, background and convexity: gradcheck, parity, precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ops_cases import (
    COUNTS,
    F64,
    F64_TOLERANCE,
    SUMS,
    assert_single_precision_rule,
    composite_inputs,
    cotangents,
    outputs_and_grads,
    rand,
    randn,
    shade_inputs,
    worst_error,
)
from torch import Tensor

from sdi_fast.ops.background import background
from sdi_fast.ops.composite import composite
from sdi_fast.ops.convexity import convexity_loss
from sdi_fast.ops.shade import shade


def _composite(dtype: torch.dtype, backend: str, counts: tuple[int, ...] = COUNTS):
    samples, leaves, directions = composite_inputs(dtype, counts)

    def run() -> list[Tensor]:
        result = composite(*leaves, samples, directions, backend=backend)
        return [getattr(result, name) for name in SUMS]

    return outputs_and_grads(run, leaves)


def test_composite_gradcheck() -> None:
    samples, leaves, directions = composite_inputs(F64, (4, 0, 6, 1))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = composite(*tensors, samples, directions, backend="cpu")
        # orient weighs by detached weights: finite differences would see through them
        return tuple(getattr(result, name) for name in SUMS[:-1])

    opacity = run(*leaves)[1]
    assert opacity.max() > 0.5 and opacity.min() < 0.5 and ((opacity - 0.5).abs() > 1e-3).all()
    assert torch.autograd.gradcheck(run, leaves)


def test_orient_gradcheck_in_the_normal() -> None:
    samples, (density, rgb, normal), directions = composite_inputs(F64, (4, 0, 6, 1))
    assert torch.autograd.gradcheck(
        lambda n: (
            composite(density.detach(), rgb.detach(), n, samples, directions, backend="cpu").orient
        ),
        normal,
    )


def test_composite_matches_twin_in_f64() -> None:
    ours, our_grads = _composite(F64, "cpu")
    twin, twin_grads = _composite(F64, "reference")
    assert worst_error(ours, twin) < F64_TOLERANCE
    assert worst_error(our_grads, twin_grads) < F64_TOLERANCE


@pytest.mark.parametrize("name", SUMS)
def test_each_output_alone_has_the_twins_gradient(name: str) -> None:
    grads = []
    for backend in ("cpu", "reference"):
        samples, leaves, directions = composite_inputs(F64)
        value = getattr(composite(*leaves, samples, directions, backend=backend), name)
        found = torch.autograd.grad(value, leaves, cotangents([value]), allow_unused=True)
        grads.append(
            [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
        )
    assert worst_error(*grads) < F64_TOLERANCE


def test_composite_obeys_single_precision_rule() -> None:
    counts = tuple(int(c) for c in rand(60, seed=8) * 200)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        outputs, grads = _composite(dtype, backend, counts)
        return outputs + grads

    assert_single_precision_rule(run)


def test_weights_match_and_carry_no_gradient() -> None:
    samples, leaves, directions = composite_inputs(F64)
    ours = composite(*leaves, samples, directions, backend="cpu").weights
    twin = composite(*leaves, samples, directions, backend="reference").weights
    assert not ours.requires_grad
    assert worst_error([ours], [twin]) < F64_TOLERANCE


def test_no_samples_give_zero_images_and_gradients() -> None:
    outputs, grads = _composite(torch.float32, "cpu", (0, 0, 0))
    assert all(torch.count_nonzero(o) == 0 for o in outputs)
    assert [g.shape[0] for g in grads] == [0, 0, 0]


@pytest.mark.parametrize("shading", ["albedo", "textureless", "diffuse"])
def test_shade_gradcheck(shading: str) -> None:
    leaves, rest = shade_inputs(F64, 12)
    assert torch.autograd.gradcheck(lambda a, n: shade(a, n, *rest, shading, backend="cpu"), leaves)


@pytest.mark.parametrize("shading", ["albedo", "textureless", "diffuse"])
def test_shade_matches_twin_and_precision(shading: str) -> None:
    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves, rest = shade_inputs(dtype)
        value = shade(*leaves, *rest, shading, backend=backend)
        grads = torch.autograd.grad(value, leaves, cotangents([value]), allow_unused=True)
        return [value] + [
            torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)
        ]

    assert worst_error(run(F64, "cpu"), run(F64, "reference")) < F64_TOLERANCE
    assert_single_precision_rule(run)


def _background_inputs(dtype: torch.dtype, n: int) -> tuple[Tensor, list[Tensor]]:
    directions = F.normalize(randn(n, 3, seed=1), dim=-1).float().to(dtype)
    shapes = ((16, 9), (16, 16), (3, 16))
    weights = [(randn(*s, seed=2 + i) * 0.5).float().to(dtype) for i, s in enumerate(shapes)]
    return directions, [w.requires_grad_() for w in weights]


def test_background_gradcheck() -> None:
    directions, weights = _background_inputs(F64, 6)
    assert torch.autograd.gradcheck(lambda *w: background(directions, *w, backend="cpu"), weights)


@pytest.mark.parametrize("n", [0, 1, 17, 5000])
def test_background_matches_twin_in_f64(n: int) -> None:
    results = []
    for backend in ("cpu", "reference"):
        directions, weights = _background_inputs(F64, n)
        results.append(
            outputs_and_grads(
                lambda b=backend, d=directions, w=weights: background(d, *w, backend=b), weights
            )
        )
    (ours, our_grads), (twin, twin_grads) = results
    assert worst_error(ours, twin) < F64_TOLERANCE
    assert worst_error(our_grads, twin_grads) < F64_TOLERANCE


def test_background_obeys_single_precision_rule() -> None:
    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        directions, weights = _background_inputs(dtype, 5000)
        outputs, grads = outputs_and_grads(
            lambda: background(directions, *weights, backend=backend), weights
        )
        return outputs + grads

    assert_single_precision_rule(run)


# Below 16 pixels a side taps coincide; at 8 and its odd multiples the second tap has no share.
CONVEXITY_SIZES = [
    (1, 8, 8), (2, 31, 33), (3, 5, 64), (1, 3, 5), (2, 1, 8), (1, 13, 1), (1, 64, 24), (70, 9, 4),
]  # fmt: skip


def _convexity_inputs(
    size: tuple[int, int, int], frame: str, dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Leaves (normals, and opacity in the camera's frame) and c2w."""
    normals = rand(*size, 3, seed=1).float().to(dtype).requires_grad_()
    if frame == "world":
        return [normals], ()
    opacity = rand(*size, 1, seed=2).float().to(dtype).requires_grad_()
    return [normals, opacity], (randn(size[0], 3, 4, seed=3).float().to(dtype),)


def _convexity(
    size: tuple[int, int, int], frame: str, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    leaves, rest = _convexity_inputs(size, frame, dtype)
    loss = convexity_loss(*leaves, *rest, backend=backend)
    return [loss, *torch.autograd.grad(loss * 3.0, leaves)]


@pytest.mark.parametrize("frame", ["world", "camera"])
@pytest.mark.parametrize("size", CONVEXITY_SIZES)
def test_convexity_matches_twin_in_f64(size: tuple[int, int, int], frame: str) -> None:
    ours, twin = (_convexity(size, frame, F64, backend) for backend in ("cpu", "reference"))
    assert worst_error(ours, twin) < F64_TOLERANCE


@pytest.mark.parametrize("frame", ["world", "camera"])
@pytest.mark.parametrize("size", CONVEXITY_SIZES)
def test_convexity_obeys_single_precision_rule(size: tuple[int, int, int], frame: str) -> None:
    assert_single_precision_rule(lambda dtype, backend: _convexity(size, frame, dtype, backend))


def test_convexity_of_one_pixel_is_zero() -> None:
    loss, grad = _convexity((1, 1, 1), "world", torch.float32, "cpu")
    assert loss == 0.0 and grad.abs().max() < 1e-15  # what 64 points add cancels, but for rounding


@pytest.mark.parametrize("frame", ["world", "camera"])
def test_convexity_gradcheck(frame: str) -> None:
    leaves, rest = _convexity_inputs((2, 9, 12), frame, F64)
    assert torch.autograd.gradcheck(
        lambda *inputs: convexity_loss(*inputs, *rest, backend="cpu"), leaves
    )


def test_convexity_shows_nan() -> None:
    normals = rand(1, 64, 64, 3).requires_grad_()
    with torch.no_grad():
        normals[0, 3, 4, 0] = float("nan")  # a tap
    loss = convexity_loss(normals, backend="cpu")
    assert loss.isnan() and torch.autograd.grad(loss, normals)[0].isnan().any()


def test_non_contiguous_inputs() -> None:
    samples, leaves, directions = composite_inputs(F64)
    wide = [torch.stack([t.detach(), t.detach()], dim=-1)[..., 0] for t in leaves]
    assert not any(t.is_contiguous() for t in wide)
    strided = dataclasses.replace(samples, t_ends=torch.stack([samples.t_ends] * 2, dim=-1)[..., 1])
    sky = directions.t().contiguous().t()
    ours = composite(*wide, strided, sky, backend="cpu")
    twin = composite(*wide, samples, directions, backend="cpu")
    for name in (*SUMS, "weights"):
        assert torch.equal(getattr(ours, name), getattr(twin, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 100_003])
def test_background_on_cuda_matches_twin(n: int) -> None:
    # the same maths as on the CPU; sums over rays in another order, f64
    results = []
    for backend in ("cuda", "reference"):
        directions, weights = _background_inputs(F64, n)
        there = directions.cuda()
        leaves = [w.detach().cuda().requires_grad_() for w in weights]
        results.append(
            outputs_and_grads(
                lambda b=backend, d=there, w=leaves: background(d, *w, backend=b), leaves
            )
        )
    (ours, our_grads), (twin, twin_grads) = results
    assert worst_error(ours, twin) < F64_TOLERANCE
    assert worst_error(our_grads, twin_grads) < F64_TOLERANCE


@pytest.mark.gpu
def test_background_on_cuda_is_deterministic_and_takes_the_current_stream() -> None:
    directions, weights = _background_inputs(torch.float32, 70_000)
    directions, leaves = directions.cuda(), [w.detach().cuda().requires_grad_() for w in weights]

    def run() -> list[Tensor]:
        outputs, grads = outputs_and_grads(
            lambda: background(directions, *leaves, backend="cuda"), leaves
        )
        return outputs + grads

    first = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = run()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
