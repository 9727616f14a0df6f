"""Rows in e4m3: twins against e4m3's definition, kernels against twins, torch's product.

On the CPU the kernels run by Triton's interpreter, with the conversion to e4m3 done in arithmetic;
the compiler's own is only compiled there, for sm_90.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compile_in_child, relative_error
from torch import Tensor

from sdi_fast.ops import rows8
from sdi_fast.reference import rows8 as twin
from sdi_fast.types import SDIFastError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter cuts off what bf16 has no bits for
SUM_DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[:2]
HALF_ULP = 2.0**-4  # of e4m3's 3 bits of mantissa
BACKENDS = ["reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def restored(rows: rows8.Rows8) -> Tensor:
    values, scale = rows
    assert values.dtype == E4M3 and scale.dtype == torch.float32
    assert scale.shape == (len(values), 1) and values.is_contiguous() and scale.is_contiguous()
    return values.float() * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e4])
def test_rows_keep_four_bits(backend: str, dtype: torch.dtype, size: float) -> None:
    if dtype == torch.float16 and size < 1e-8:
        size = 1e-4
    x = (size * torch.randn(37, 80)).to(dtype).to(DEVICE)
    rows = rows8.quantise_rows(x, backend=backend)
    exact, ours = x.double(), restored(rows).double()
    amax = exact.abs().amax(1, keepdim=True)
    assert (rows[0].float().abs().amax(1) == 448.0).all(), "the largest is where e4m3 ends"
    # normal numbers of e4m3 by half a unit of their last bit, smaller ones by half the smallest
    allowed = torch.maximum(HALF_ULP * exact.abs(), amax * (2.0**-10 / 448.0))
    assert ((ours - exact).abs() <= allowed * (1 + 1e-5)).all()
    assert relative_error(ours, exact) < 0.03, "2.6% for numbers spread evenly over a binade"


def test_zero_rows_overflow_and_nan(backend: str) -> None:
    x = torch.zeros(5, 24, device=DEVICE)
    x[1, 3] = float("inf")
    x[1, 4] = -float("inf")
    x[1, 5] = 1.0
    x[2, 0] = float("nan")
    x[3] = 1e-38
    x[4] = 3e38 * torch.linspace(-1.0, 1.0, 24)
    values, scale = rows8.quantise_rows(x, backend=backend)
    assert torch.isfinite(scale[[0, 1, 3, 4]]).all() and (scale[[0, 1, 3, 4]] > 0).all()
    assert not values[0].float().any() and not values[3].float().any()
    assert values[1, 3:6].tolist() == [448.0, -448.0, 0.0], "saturated, without a NaN"
    knows_nan = backend == "reference" or DEVICE == "cuda"  # Triton's interpreter makes it 384
    assert torch.isnan(values[2, 0].float()) or not knows_nan
    assert torch.isfinite(values[[0, 1, 3, 4]].float()).all()
    weight, weight_scale = rows8.quantise_rows(randn(16, 24), backend="reference")
    out = rows8.linear8(
        values, scale, weight.t(), weight_scale.t(), dtype=torch.float32, backend="reference"
    )
    assert not out[0].any() and (torch.isnan(out[2]).all() or not knows_nan)


def test_the_kernel_rounds_as_the_twin(backend: str) -> None:
    x = 100.0 * randn(9, 48, dtype=torch.float16)
    assert close(rows8.quantise_rows(x, backend=backend), twin.quantise_rows(x))
    if DEVICE == "cpu":  # on a GPU 448 / amax has not all of its bits
        ours = rows8.quantise_rows(x, backend=backend)
        assert torch.equal(restored(ours), restored(twin.quantise_rows(x)))


def close(ours: rows8.Rows8, expected: rows8.Rows8) -> bool:
    """The same but for sums in another order: now and then a value falls to the other side of a
    rounding's middle, which is a whole unit of 2^-3."""
    a, b = restored(ours), restored(expected)
    differ = (a - b).abs() > 1e-5 * b.abs()
    one_off = (a - b).abs() <= (2.0**-3 + 1e-5) * torch.maximum(a.abs(), b.abs())
    same_scale = relative_error(ours[1], expected[1]) < 1e-6
    return same_scale and bool(one_off.all()) and differ.float().mean().item() < 0.01


@pytest.mark.parametrize("dtype", SUM_DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (9, 80), (6, 320), (3, 1280)])
@pytest.mark.parametrize("has_added", [False, True])
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, has_added: bool) -> None:
    pytest.importorskip("triton")
    x, weight, bias = randn(*shape, dtype=dtype), randn(shape[1]), randn(shape[1])
    shift = 2.0 * randn(shape[1]) if shape[0] > 1 else None
    added = randn(*shape, dtype=dtype) if has_added else None
    results = []
    for backend in BACKENDS:
        h = x.clone()
        results.append(rows8.layer_norm8(h, added, weight, bias, shift, eps=1e-5, backend=backend))
        assert torch.equal(h, x if added is None else x + added), "the stream goes on"
    assert close(results[1], results[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (9, 96), (5, 2560)])
def test_geglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    x, bias = 3.0 * randn(*shape, dtype=dtype), randn(shape[1])
    ours, expected = (rows8.geglu8(x, bias, backend=name) for name in BACKENDS)
    assert close(ours, expected)


def test_geglu_beyond_the_range_of_half_precision(backend: str) -> None:
    """3e4^2 is infinite in f16; a row in e4m3 holds it."""
    x = torch.full((2, 32), 3e4, dtype=torch.float16, device=DEVICE)
    rows = rows8.geglu8(x, torch.zeros(32, device=DEVICE), backend=backend)
    assert restored(rows).cpu().flatten().tolist() == pytest.approx([9e8] * 32, rel=1e-3)


def product_case(m: int, k: int, n: int) -> tuple[Tensor, ...]:
    rows, columns = twin.quantise_rows(randn(m, k)), twin.quantise_rows(randn(n, k))
    return (*rows, columns[0].t(), columns[1].t())


def has_product() -> bool:
    """Whether this torch multiplies e4m3 with a scale a row: on the CPU not all versions do."""
    try:
        rows8.scaled_mm(*product_case(16, 16, 16), torch.float32)
    except (RuntimeError, ValueError):
        return DEVICE == "cuda"
    return True


needs_product = pytest.mark.skipif(not has_product(), reason="torch has no such product on a CPU")


@needs_product
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16, 16), (37, 320, 960), (64, 1280, 48)])
def test_the_product_is_torchs(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """torch._scaled_mm, which a GPU runs, against the twin: sums in another order, one rounding of
    the result; on a GPU sums of about 14 bits besides ("fast accumulation")."""
    case = product_case(*shape)
    exact = (case[0].double() * case[1]) @ (case[2].double() * case[3])
    rounding = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    ours = twin.linear8(*case, dtype=dtype)
    assert ours.dtype == dtype and relative_error(ours, exact) < rounding
    theirs = rows8.scaled_mm(*case, dtype)
    fast = 1e-2 if DEVICE == "cuda" else 0.0
    assert theirs.dtype == dtype and relative_error(theirs, exact) < rounding + fast


def test_empty_rows(backend: str) -> None:
    empty, weight = torch.empty(0, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    for rows in (
        rows8.quantise_rows(empty, backend=backend),
        rows8.layer_norm8(empty, None, weight, weight, None, eps=1e-5, backend=backend),
        rows8.geglu8(empty.repeat(1, 2), weight.repeat(2), backend=backend),
    ):
        assert rows[0].shape == (0, 16) and rows[1].shape == (0, 1)


def test_bad_arguments_are_named() -> None:
    x, vector = randn(4, 16), randn(16)
    case = product_case(4, 16, 16)
    for message, call in {
        "added: expected shape": lambda: rows8.layer_norm8(
            x, x[:2], vector, vector, None, eps=1e-5
        ),
        "x: expected dtype": lambda: rows8.quantise_rows(x.double()),
        "x: expected a contiguous": lambda: rows8.layer_norm8(
            randn(16, 4).t(), x, vector, vector, None, eps=1e-5
        ),
        "even number": lambda: rows8.geglu8(randn(4, 5), randn(5)),
        "x_scale: expected shape": lambda: rows8.linear8(
            case[0], case[1].t(), case[2], case[3], dtype=torch.float32
        ),
        "weight: expected dtype": lambda: rows8.linear8(
            case[0], case[1], randn(16, 16), case[3], dtype=torch.float32
        ),
    }.items():
        with pytest.raises(SDIFastError, match=message):
            call()


def test_devices_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows8.check_device(torch.device("cpu"), torch.float32)  # computes by the twins
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(SDIFastError) as caught:
        rows8.check_device(device, torch.float16)
    message = "linears: fp8 needs an NVIDIA GPU of compute capability 8.9 or later, got "
    assert str(caught.value) == message + "NVIDIA A100 of 8.0"

    def refuse(*args: Any) -> Tensor:
        raise ValueError("Only bf16 high precision output types are supported\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(rows8, "scaled_mm", refuse)
    zeros, ones = torch.zeros, torch.ones
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    with pytest.raises(SDIFastError, match="torch.float16 .* has here: Only bf16") as caught:
        rows8.check_device(device, torch.float16)
    assert "\n" not in str(caught.value)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sdi_fast.kernels import rows8

rows = dict(block=512, rows=8)
norm = dict(n_channels=320, has_shift=True, has_added=True)
for kernel, constants in (
    (rows8._quantise_rows, rows | dict(n_columns=320)),
    (rows8._layer_norm8, rows | norm),
    (rows8._geglu8, dict(block=2048, rows=8, n_columns=1280)),
):
    types = {name: "i32" for name in kernel.arg_names}
    types |= {n: "*fp16" for n in ("x", "added") if n in types}
    types |= {n: "*fp32" for n in ("weight", "bias", "shift", "scale") if n in types}
    types |= {"eps": "fp32"} if "eps" in types else {}
    types |= {"values": "*fp8e4nv"}
    types |= {name: "constexpr" for name in constants}
    source = ASTSource(kernel, types, constexprs=constants)
    for arch in (89, 90):
        assembly = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
        assert "cvt.rn.satfinite.e4m3x2.f32" in assembly, "saturates, whatever comes"
print("compiled")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile the kernels")
def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    compile_in_child(COMPILE, tmp_path)
