"""What the GPU at hand can do at best, measured, and how far the fused renderer is from it.

Bytes and operations of a sample follow csrc/cuda/render_fwd.cu and render_bwd.cu, with L levels of
2 f16 features, H = 64 hidden units and widths 2 L -> H -> 1 and 2 L -> H -> 3; a multiply-add
counts as two operations:
    forward   = 2 (3 * 2L H + H + 3 H)     density, its slope by the features, colour
    backward  = forward                    recomputed
              + 2 (4 * 2L H + H + 2 * 3 H) gradients of W1, V1; W1 combined, V1^T gate; w2, V2 twice
The forward gathers 8 corners of 4 bytes a level and sample tried; the backward as many a sample
kept, and adds 8 bytes to each corner's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import kernel_table
from torch import Tensor

CORNERS = 8
ENTRY_BYTES = 4  # two features in f16
GRADIENT_BYTES = 8  # two in f32
SECTOR_BYTES = 32  # what L2 moves at least
HIDDEN = 64
COPY_BYTES = 1 << 30  # far beyond any cache
RESIDENT_BYTES = 8 << 20  # read and written: 16 MiB, within half the L2 of an H100
MATMUL_SIZE = 8192


def forward_flops(levels: int) -> int:
    """Operations of a sample tried."""
    width = 2 * levels
    return 2 * (3 * width * HIDDEN + HIDDEN + 3 * HIDDEN)


def backward_flops(levels: int) -> int:
    """Operations of a sample kept."""
    width = 2 * levels
    return forward_flops(levels) + 2 * (4 * width * HIDDEN + HIDDEN + 6 * HIDDEN)


def gathered_bytes(levels: int) -> int:
    """Bytes of table entries that a sample takes."""
    return levels * CORNERS * ENTRY_BYTES


def scattered_bytes(levels: int) -> int:
    """Bytes that a kept sample adds to the table's gradient, before any are added up in a warp."""
    return levels * CORNERS * GRADIENT_BYTES


def measure_ceilings() -> dict[str, float]:
    """GB/s of copies (bytes read and written) and TFLOP/s of a square f16 product, by events."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_s = _seconds(lambda: target.copy_(source))
    resident, copied = source[:RESIDENT_BYTES], target[:RESIDENT_BYTES]
    resident_s = _seconds_in_graph(lambda: copied.copy_(resident))
    n = MATMUL_SIZE
    a, b = (torch.randn(n, n, dtype=torch.float16, device="cuda") for _ in range(2))
    matmul_s = _seconds(lambda: a @ b)
    return {
        "copy_gbs": 2 * COPY_BYTES / copy_s / 1e9,
        "l2_copy_gbs": 2 * RESIDENT_BYTES / resident_s / 1e9,
        "matmul_tflops": 2 * n**3 / matmul_s / 1e12,
    }


def _seconds(function: Callable[[], Any], repeats: int = 20) -> float:
    """Of a call, the mean over `repeats` queued one behind the other."""
    for _ in range(3):
        function()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def _seconds_in_graph(function: Callable[[], Tensor], repeats: int = 100) -> float:
    """As `_seconds`, for calls too short for the host to queue in time."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()
    return _seconds(graph.replay, 5) / repeats


def kernel_rows(
    function: Callable[[], Any], counts: tuple[int, int], levels: int, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """`harness.kernel_table`, with rates for the fused kernels; `counts`: samples kept, tried."""
    kept, tried = counts
    work = {
        "render_views_fwd_kernel": (tried, tried * forward_flops(levels), 0),
        "render_views_bwd_kernel": (kept, kept * backward_flops(levels), scattered_bytes(levels)),
    }
    rows = kernel_table(function)
    for row in rows:
        for name, (samples, flops, scattered) in work.items():
            if name not in row["name"]:
                continue
            seconds = row["us"] * 1e-6
            gathered = samples * gathered_bytes(levels)
            row.update(
                samples=samples,
                gathered_bytes=gathered,
                gather_gbs=gathered / seconds / 1e9,
                scatter_gbs=samples * scattered / seconds / 1e9,
                tflops=flops / seconds / 1e12,
                copy_share=gathered / seconds / 1e9 / ceilings["copy_gbs"],
                l2_share=gathered / seconds / 1e9 / ceilings["l2_copy_gbs"],
                matmul_share=flops / seconds / 1e12 / ceilings["matmul_tflops"],
            )
    return rows


def print_kernels(rows: list[dict[str, Any]], at_most: int = 16) -> None:
    print(f"{'kernel':60}{'calls':>7}{'us':>10}  gathers | scatters | products")
    for row in rows[:at_most]:
        name = row["name"] if len(row["name"]) < 59 else row["name"][:55] + " ..."
        line = f"{name:60}{row['calls']:7.1f}{row['us']:10.1f}"
        if "gather_gbs" in row:
            line += (
                f"  {row['gather_gbs']:.0f} GB/s ({row['l2_share']:.0%} of an L2 copy, "
                f"{row['copy_share']:.0%} of a copy) | {row['scatter_gbs']:.0f} GB/s | "
                f"{row['tflops']:.1f} TFLOP/s ({row['matmul_share']:.1%} of a matmul)"
            )
        print(line)
    if len(rows) > at_most:
        rest = sum(row["us"] for row in rows[at_most:])
        print(f"{f'{len(rows) - at_most} more':60}{'':7}{rest:10.1f}")


def limit_text(counts: tuple[int, int], levels: int, ceilings: dict[str, float]) -> str:
    """The least that the work itself takes at the measured rates, in words."""
    kept, tried = counts
    l2, matmul = ceilings["l2_copy_gbs"] * 1e9, ceilings["matmul_tflops"] * 1e12
    lines = []
    for name, samples, flops, scattered in (
        ("forward", tried, forward_flops(levels), 0),
        ("backward", kept, backward_flops(levels), scattered_bytes(levels)),
    ):
        each = gathered_bytes(levels) + scattered
        sectors = levels * CORNERS * SECTOR_BYTES * (2 if scattered else 1)
        lines.append(
            f"{name}: {samples / 1e6:.2f} M samples x {each} B = {samples * each / 1e9:.1f} GB: "
            f"{samples * each / l2 * 1e3:.2f} ms at the L2 copy's {l2 / 1e9:.0f} GB/s, "
            f"{samples * sectors / l2 * 1e3:.2f} ms if no two corners shared a {SECTOR_BYTES} B "
            f"sector; {samples * flops / 1e9:.0f} GFLOP: {samples * flops / matmul * 1e3:.2f} ms "
            f"at the matmul's {matmul / 1e12:.0f} TFLOP/s"
        )
    lines.append("gathers that L1 serves cost L2 nothing: the first number can be undercut")
    return "\n".join(lines)
