"""The UNet's Triton kernels against their twins; on the CPU by Triton's interpreter.

f32: both sum in f32 in different orders; the bound is a few roundings of sums of up to 10^4 terms.
f16 and bf16: inputs are rounded, sums are not: one rounding of the result, 2^-11 or 2^-8 relative.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from sdi_fast.kernels.conv3x3 import ConvTile, conv_tiles
from sdi_fast.kernels.group_norm import default_splits
from sdi_fast.kernels.linear_geglu import Tile
from sdi_fast.ops import unet_ops
from sdi_fast.reference import unet_ops as twin
from sdi_fast.types import SDIFastError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(TOLERANCE)
# Triton's interpreter takes bf16's bits for integers in tl.dot
DOT_DTYPES = DTYPES if DEVICE == "cuda" else [torch.float32, torch.float16]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def group_norm_case(
    sizes: tuple[int, ...], n_rows: int = 21, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor]:
    c = sum(sizes)
    parts = [randn(batch, n_rows, size, dtype=dtype) for size in sizes]
    return parts, randn(c), randn(c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("sizes", [(20,), (12, 8), (15,), (32, 28)])
def test_group_norm(sizes: tuple[int, ...], splits: int, dtype: torch.dtype) -> None:
    """Groups of 4, 3 and 12 channels; parts that end inside of a group."""
    parts, weight, bias = group_norm_case(sizes, dtype=dtype)
    n_groups = sum(sizes) // {20: 4, 15: 3, 60: 12}[sum(sizes)]
    options: dict[str, Any] = dict(n_groups=n_groups, eps=1e-5, silu=True)
    ours = unet_ops.group_norm(
        parts, weight, bias, None, splits=splits, backend="triton", **options
    )
    assert ours.dtype == dtype
    expected = twin.group_norm([p.float() for p in parts], weight, bias, None, **options)
    assert relative_error(ours, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("splits", [1, 2])
def test_group_norm_adds_the_shift(rows: int, silu: bool, splits: int) -> None:
    parts, weight, bias = group_norm_case((8, 12))
    table = 3.0 * randn(rows, 50)
    options: dict[str, Any] = dict(n_groups=5, eps=1e-5, silu=silu)
    shift = table[:, 7:27]  # strided, as a slice of the table of time steps
    ours = unet_ops.group_norm(
        parts, weight, bias, shift, splits=splits, backend="triton", **options
    )
    expected = twin.group_norm(parts, weight, bias, shift, **options)
    assert relative_error(ours, expected) < TOLERANCE[torch.float32]


def test_the_group_norm_twin_is_torchs() -> None:
    parts, weight, bias = group_norm_case((8, 12))
    ours = twin.group_norm(parts, weight, bias, None, n_groups=5, eps=1e-5, silu=True)
    x = torch.cat(parts, dim=-1).transpose(1, 2)
    theirs = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 5, weight, bias, 1e-5))
    assert relative_error(ours, theirs.transpose(1, 2)) < 1e-6


@pytest.mark.parametrize("splits", [1, 4])
def test_group_norm_with_a_mean_far_above_the_deviation(splits: int) -> None:
    """f32 squares of 1000 would leave no digit of a deviation of 0.1."""
    x = (1000.0 + 0.1 * torch.randn(2, 700, 8, dtype=torch.float64)).float().to(DEVICE)
    weight, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    ours = unet_ops.group_norm(
        [x], weight, bias, None, n_groups=2, eps=1e-5, silu=False, splits=splits, backend="triton"
    )
    grouped = x.double().view(2, 700, 2, 4)
    variance, mean = torch.var_mean(grouped, (1, 3), keepdim=True, correction=0)
    expected = ((grouped - mean) / (variance + 1e-5).sqrt()).view(2, 700, 8)
    # the mean itself has f32's resolution at 1000, 6e-5 of 0.1
    assert relative_error(ours, expected) < 1e-3


def test_splits_fill_the_gpu() -> None:
    assert default_splits(4, 64, 32, 40) == 1 and default_splits(4, 4096, 32, 10) == 32
    assert default_splits(1, 4096, 32, 10) == 64, "fewer samples, shorter shares"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (9, 20), (6, 64), (5, 130)])
@pytest.mark.parametrize("with_shift", [True, False])
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, with_shift: bool) -> None:
    x, weight, bias = randn(*shape, dtype=dtype), randn(shape[1]), randn(shape[1])
    shift = 2.0 * randn(shape[1]) if with_shift else None
    ours = unet_ops.layer_norm(x, weight, bias, shift, eps=1e-5, backend="triton")
    assert ours.dtype == dtype
    expected = twin.layer_norm(x.float(), weight, bias, shift, eps=1e-5)
    assert relative_error(ours, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (9, 40), (17, 514)])
def test_geglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, bias = 3.0 * randn(*shape, dtype=dtype), randn(shape[1])
    ours = unet_ops.geglu(x, bias, backend="triton")
    assert ours.dtype == dtype
    assert relative_error(ours, twin.geglu(x.float(), bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, 2, 2, 4), (3, 4, 6, 20), (2, 5, 3, 520)])
def test_interleave_phases(shape: tuple[int, ...]) -> None:
    x = randn(*shape, dtype=torch.float16)
    ours = unet_ops.interleave_phases(x, backend="triton")
    assert torch.equal(ours, twin.interleave_phases(x))


def assert_rounded_once(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 2), (70, 72, 6), (33, 40, 160)])  # M, K, 2 F
@pytest.mark.parametrize("tma", [False, True])
def test_linear_geglu(shape: tuple[int, int, int], dtype: torch.dtype, tma: bool) -> None:
    """Sizes that are no multiples of the tile; the inner one below and above its 32."""
    m, k, f2 = shape
    x, weight, bias = randn(m, k, dtype=dtype), randn(f2, k, dtype=dtype), randn(f2)
    tile = Tile(32, 32, 32, warps=4, tma=tma)
    ours = unet_ops.linear_geglu(x, weight, bias, tile=tile, backend="triton")
    expected = twin.linear_geglu(x.float(), weight.float(), bias)
    assert_rounded_once(ours, expected, dtype)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("with_residual", [True, False])
def test_conv3x3(splits: int, with_residual: bool, dtype: torch.dtype) -> None:
    """An odd image, channels and filters that are no multiples of the tile."""
    x, weight = randn(2, 5, 7, 40, dtype=dtype), randn(36, 3, 3, 40, dtype=dtype)
    residual = 10.0 * randn(2, 5, 7, 36, dtype=dtype) if with_residual else None
    tile = ConvTile(32, 32, 32, splits=splits, warps=4)
    ours = unet_ops.conv3x3(x, weight, residual, tile=tile, backend="triton")
    given = None if residual is None else residual.float()
    assert_rounded_once(ours, twin.conv3x3(x.float(), weight.float(), given), dtype)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("with_residual", [True, False])
def test_conv3x3_padded(splits: int, with_residual: bool, dtype: torch.dtype) -> None:
    """Two images, so that one's border lies beside the other; 36 filters in tiles of 32."""
    x, weight = randn(2, 5, 7, 64, dtype=dtype), randn(36, 3, 3, 64, dtype=dtype)
    residual = 10.0 * randn(2, 5, 7, 36, dtype=dtype) if with_residual else None
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 1))
    tile = ConvTile(32, 32, 32, splits=splits, warps=4)
    ours = unet_ops.conv3x3_padded(padded, weight, residual, tile=tile, backend="triton")
    given = None if residual is None else residual.float()
    assert_rounded_once(ours, twin.conv3x3(x.float(), weight.float(), given), dtype)


@pytest.mark.parametrize("splits", [1, 3])
def test_group_norm_writes_the_margin(splits: int) -> None:
    parts, weight, bias = group_norm_case((8, 12), n_rows=35)
    options: dict[str, Any] = dict(n_groups=5, eps=1e-5, silu=True, pad_width=7)
    ours = unet_ops.group_norm(
        parts, weight, bias, None, splits=splits, backend="triton", **options
    )
    expected = twin.group_norm(parts, weight, bias, None, **options)
    assert ours.shape == (2, 48, 20) and (ours == 0).sum() >= 2 * 13 * 20
    assert relative_error(ours, expected) < TOLERANCE[torch.float32]


def test_conv_tiles_fill_the_gpu() -> None:
    for n_pixels, filters, channels in ((256, 1280, 2560), (1024, 1280, 1280), (16384, 320, 320)):
        tiles = conv_tiles(n_pixels, filters, channels)
        assert tiles and len(set(tiles)) == len(tiles)
    assert all(t.splits > 1 for t in conv_tiles(256, 1280, 2560) if t.block_m * t.block_n > 8192)


def test_empty_batches() -> None:
    empty = torch.empty(0, 7, 8, device=DEVICE)
    weight = torch.ones(8, device=DEVICE)
    options: dict[str, Any] = dict(n_groups=2, eps=1e-5, silu=True, backend="triton")
    assert unet_ops.group_norm([empty], weight, weight, None, **options).shape == (0, 7, 8)
    flat = empty.view(0, 8)
    for out in (
        unet_ops.layer_norm(flat, weight, weight, None, eps=1e-5, backend="triton"),
        unet_ops.geglu(torch.cat([flat, flat], 1), weight.repeat(2), backend="triton"),
    ):
        assert out.shape == (0, 8)


def test_bad_arguments_are_named() -> None:
    parts, weight, bias = group_norm_case((8, 12))
    options: dict[str, Any] = dict(n_groups=5, eps=1e-5, silu=True)
    for message, call in {
        "n_groups: expected a divisor": lambda: unet_ops.group_norm(
            parts, weight, bias, None, **{**options, "n_groups": 3}
        ),
        "parts: expected 1 or 2": lambda: unet_ops.group_norm([], weight, bias, None, **options),
        r"parts\[1\]": lambda: unet_ops.group_norm(
            [parts[0], parts[1][:1]], weight, bias, None, **options
        ),
        "weight: expected shape": lambda: unet_ops.group_norm(
            parts, weight[:3], bias, None, **options
        ),
        "shift: expected": lambda: unet_ops.group_norm(
            parts, weight, bias, weight[None].repeat(3, 1), **options
        ),
        "x: expected dtype": lambda: unet_ops.geglu(torch.ones(2, 4).double(), weight[:4]),
        "even number": lambda: unet_ops.geglu(torch.ones(2, 5, device=DEVICE), weight[:5]),
        r"\[B, H \+ 1": lambda: unet_ops.interleave_phases(torch.ones(1, 3, 3, 6, device=DEVICE)),
    }.items():
        with pytest.raises(SDIFastError, match=message):
            call()
