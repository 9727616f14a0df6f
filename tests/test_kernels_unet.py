"""The UNet's Triton kernels against their twins; on the CPU by Triton's interpreter.

f32: both sum in f32 in different orders; the bound is a few roundings of sums of up to 10^4 terms.
f16 and bf16: inputs are rounded, sums are not: one rounding of the result, 2^-11 or 2^-8 relative.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compile_in_child, relative_error
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from sdi_fast.kernels.group_norm import default_splits
from sdi_fast.kernels.linear_geglu import Tile, geglu_tiles
from sdi_fast.ops import unet_ops
from sdi_fast.reference import unet_ops as twin
from sdi_fast.types import SDIFastError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(TOLERANCE)
# Triton's interpreter takes bf16's bits for integers in tl.dot
DOT_DTYPES = DTYPES if DEVICE == "cuda" else [torch.float32, torch.float16]


def combine(step: int, *values: Any) -> list[tuple[Any, ...]]:
    """All combinations; on a GPU, where each is compiled, every step-th, which meets all values."""
    every = list(itertools.product(*values))
    return every[::step] if DEVICE == "cuda" else every


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def group_norm_case(
    sizes: tuple[int, ...], n_rows: int = 21, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor]:
    c = sum(sizes)
    parts = [randn(batch, n_rows, size, dtype=dtype) for size in sizes]
    return parts, randn(c), randn(c)


@pytest.mark.parametrize(
    ("sizes", "splits", "dtype"),
    combine(5, [(20,), (12, 8), (15,), (32, 28)], [1, 3, 16], DTYPES),
)
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


@pytest.mark.parametrize(("sizes", "n_rows"), [((320,), 37), ((320, 640), 130), ((1280,), 16)])
@pytest.mark.parametrize("splits", [0, 1, 2])
def test_group_norm_at_the_networks_widths(
    sizes: tuple[int, ...], n_rows: int, splits: int
) -> None:
    """32 groups of 10, 30 and 40 channels in slabs of 120, the last one not full."""
    parts, weight, bias = group_norm_case(sizes, n_rows, batch=1, dtype=torch.float16)
    shift = randn(1, sum(sizes), dtype=torch.float16)
    options: dict[str, Any] = dict(n_groups=32, eps=1e-5, silu=True)
    ours = unet_ops.group_norm(
        parts, weight, bias, shift, splits=splits, backend="triton", **options
    )
    expected = twin.group_norm([p.float() for p in parts], weight, bias, shift, **options)
    assert relative_error(ours, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(("rows", "silu", "splits"), combine(3, [1, 2], [True, False], [1, 2]))
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


@pytest.mark.parametrize(
    ("shape", "with_shift", "dtype"),
    combine(5, [(1, 5), (9, 20), (6, 64), (5, 130)], [True, False], DTYPES),
)
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, with_shift: bool) -> None:
    x, weight, bias = randn(*shape, dtype=dtype), randn(shape[1]), randn(shape[1])
    shift = 2.0 * randn(shape[1]) if with_shift else None
    ours = unet_ops.layer_norm(x, weight, bias, shift, eps=1e-5, backend="triton")
    assert ours.dtype == dtype
    expected = twin.layer_norm(x.float(), weight, bias, shift, eps=1e-5)
    assert relative_error(ours, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("shape", "dtype"), combine(2, [(1, 2), (9, 40), (17, 514)], DTYPES))
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


@pytest.mark.parametrize(
    ("shape", "dtype"),
    combine(2, [(1, 16, 2), (70, 72, 6), (33, 40, 160)], DOT_DTYPES),  # M, K, 2 F
)
def test_linear_geglu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Sizes that are no multiples of the tile; the inner one below and above its 32."""
    m, k, f2 = shape
    x, weight, bias = randn(m, k, dtype=dtype), randn(f2, k, dtype=dtype), randn(f2)
    tile = Tile(32, 32, 32, warps=4)
    ours = unet_ops.linear_geglu(x, weight, bias, tile=tile, backend="triton")
    assert ours.dtype == dtype
    expected = twin.linear_geglu(x.float(), weight.float(), bias)
    assert relative_error(ours, expected) < TOLERANCE[dtype], "rounded once"


def test_tiles_are_few_since_each_is_compiled_and_measured() -> None:
    for n_rows, n_inner in ((16384, 320), (256, 1280), (1, 320)):
        tiles = geglu_tiles(n_rows, n_inner)
        assert 2 <= len({str(tile) for tile in tiles}) == len(tiles) <= 3


def test_gelu_is_nearer_to_the_truth_than_torchs() -> None:
    gate = torch.linspace(-12.0, 12.0, 2**16)
    x = torch.cat([torch.ones(16, 2**12), gate.view(16, -1)], 1).to(DEVICE)
    ours = unet_ops.geglu(x, torch.zeros(2**13, device=DEVICE), backend="triton")
    ours = ours.flatten().cpu().double()
    exact = 0.5 * gate.double() * torch.erfc(-gate.double() / 2**0.5)
    theirs = torch.nn.functional.gelu(gate).double()
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max()
    tail = (gate < -0.1) & (gate > -5.0)
    assert ((ours - exact) / exact).abs()[tail].max() < 1e-5, "no cancellation of 1 + erf"


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
        "x: expected a multiple of 4 columns": lambda: unet_ops.linear_geglu(
            torch.ones(2, 6, device=DEVICE),
            torch.ones(4, 6, device=DEVICE),
            weight[:4],
            backend="triton",
        ),
        r"\[B, H \+ 1": lambda: unet_ops.interleave_phases(torch.ones(1, 3, 3, 6, device=DEVICE)),
    }.items():
        with pytest.raises(SDIFastError, match=message):
            call()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sdi_fast.kernels import geglu, group_norm_held, group_norm_rows, layer_norm, linear_geglu

common = dict(has_skip=True, has_shift=True)
rows = dict(tile_channels=64, tile_groups=8, tile_rows=16)
flags = dict(silu=True)
tile = dict(block_m=128, block_n=64, block_k=64, group_m=8, precision="tf32")
vectors = dict(n_lanes=256, steps=2, per=5, vec=8, exact=False)
for kernel, constants in (
    (group_norm_held._group_norm_held, vectors | common | flags),
    (group_norm_rows._group_norm_sums, rows | common | dict(slab=60, steps=4, turns=2)),
    (group_norm_rows._group_norm_write, rows | common | flags | dict(splits_pad=16)),
    (geglu._geglu, dict(block=128, rows=16)),
    (layer_norm._layer_norm, dict(n_channels=320, block=512, rows=8, has_shift=True)),
    (linear_geglu._linear_geglu, tile),
):
    types = {name: "i32" for name in kernel.arg_names}
    types |= {n: "*fp16" for n in ("x", "skip", "shift", "out") if n in types}
    types |= {n: "*fp32" for n in ("weight", "bias", "partial") if n in types}
    types |= {"eps": "fp32"} if "eps" in types else {}
    if kernel is linear_geglu._linear_geglu:
        types |= {"x": "tensordesc<fp16[128, 64]>", "weight": "tensordesc<fp16[64, 64]>"}
    types |= {name: "constexpr" for name in constants}
    source = ASTSource(kernel, types, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
print("compiled")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile the kernels")
def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    compile_in_child(COMPILE, tmp_path)


def test_strided_vectors_are_read_as_they_are() -> None:
    parts, weight, bias = group_norm_case((20,))
    rows, wide, inner = randn(6, 20), randn(40), randn(12, 20)

    def turned(v: Tensor) -> Tensor:
        return torch.stack([v, v + 7], dim=1)[:, 0]

    def all_of(change: Any) -> list[Tensor]:
        w, b = change(weight), change(bias)
        shift = change(weight + 1)
        norm = dict(n_groups=4, eps=1e-5, silu=True, backend="triton")
        return [
            unet_ops.group_norm(parts, w, b, shift[None], **norm),
            unet_ops.layer_norm(rows, w, b, shift, eps=1e-5, backend="triton"),
            unet_ops.geglu(rows.repeat(1, 2), change(wide), backend="triton"),
            unet_ops.linear_geglu(rows, inner, change(wide[:12]), backend="triton"),
        ]

    for a, b in zip(all_of(turned), all_of(torch.clone), strict=True):
        assert torch.equal(a, b)
