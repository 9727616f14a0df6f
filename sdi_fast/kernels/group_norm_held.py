"""Group norm in one launch: a program holds a group of a sample in registers.

Twin: group_norm of sdi_fast/reference/unet_ops.py; formula and choice: group_norm.py.

Mapping: the lanes run over the group's vectors of vec neighbouring channels (a group has 10 to 80
channels in a row, so that whole rows would leave lanes idle), 8 numbers a thread and step, all
steps' reads in flight at once. Mean first and then the deviations, in f32, from registers. With a
margin the rows are those of the result, and the margin's are zeros that are not counted.

Bytes per element in f16: 2 read, 2 written; weight and bias, 8, come from L1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import silu as apply_silu


@triton.jit
def _place(
    place: tl.tensor,  # [n_lanes, 1] index into the n_out * per vectors of the group's result
    n_out: tl.tensor,
    width: tl.tensor,
    per: tl.constexpr,
    padded: tl.constexpr,
) -> tl.tuple:
    """The row of the input, and whether there is one."""
    row = place // per
    inside = place < n_out * per
    if padded:
        line = row // (width + 1)
        column = row - line * (width + 1)
        inside = inside & (column < width) & (row < n_out - (width + 1))
        row = row - line
    return row, inside


@triton.jit
def _channel(place: tl.tensor, group: tl.tensor, per: tl.constexpr, vec: tl.constexpr) -> tl.tensor:
    return group * (per * vec) + (place % per) * vec + tl.arange(0, vec)[None, :]


@triton.jit(do_not_specialize=("n_rows", "n_out", "width"))
def _group_norm_held(
    x: tl.tensor,  # [B, N, c_x]
    skip: tl.tensor,  # [B, N, c_skip] where has_skip
    shift: tl.tensor,  # [B or 1, C] where has_shift
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    out: tl.tensor,  # [B, n_out, C]
    n_rows: tl.tensor,  # N
    n_out: tl.tensor,  # N, or with the margin (H + 1) (W + 1)
    c_x: tl.tensor,
    c_skip: tl.tensor,
    shift_stride: tl.tensor,
    width: tl.tensor,  # W where padded
    eps: tl.tensor,
    n_lanes: tl.constexpr,
    steps: tl.constexpr,
    per: tl.constexpr,  # vectors of a group in a row
    vec: tl.constexpr,
    exact: tl.constexpr,  # no lane is idle at any step
    has_skip: tl.constexpr,
    has_shift: tl.constexpr,
    silu: tl.constexpr,
    padded: tl.constexpr,
) -> None:
    group = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, n_lanes)[:, None]
    first = x + sample * n_rows * c_x
    second = skip + sample * n_rows * c_skip
    held = ()
    total = tl.zeros([n_lanes, vec], tl.float32)
    for step in tl.static_range(steps):
        place = step * n_lanes + lanes
        row, inside = _place(place, n_out, width, per, padded)
        channel = _channel(place, group, per, vec)
        mask = inside & (channel >= 0)  # of channel's shape
        if has_skip:
            left = mask & (channel < c_x)
            right = mask & (channel >= c_x)
            value = tl.load(first + (row * c_x + channel), mask=left, other=0.0).to(tl.float32)
            at = row * c_skip + (channel - c_x)
            value += tl.load(second + at, mask=right, other=0.0).to(tl.float32)
        else:
            value = tl.load(first + (row * c_x + channel), mask=mask, other=0.0).to(tl.float32)
        if has_shift:
            at = shift + sample * shift_stride + channel
            value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        held = held + (value,)  # type: ignore[assignment]
        total += value
    # of the first step, so that they are in L1 when they are needed
    w0 = tl.load(weight + _channel(lanes, group, per, vec)).to(tl.float32)
    b0 = tl.load(bias + _channel(lanes, group, per, vec)).to(tl.float32)
    n = n_rows * (per * vec)
    mean = tl.sum(tl.sum(total, 1), 0) / n
    squares = tl.zeros([n_lanes, vec], tl.float32)
    for step in tl.static_range(steps):
        off = held[step] - mean
        if not exact:
            _, inside = _place(step * n_lanes + lanes, n_out, width, per, padded)
            off = tl.where(inside, off, 0.0)
        squares += off * off
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / n + eps)
    to = out + sample * n_out * (c_x + c_skip)
    for step in tl.static_range(steps):
        place = step * n_lanes + lanes
        _, inside = _place(place, n_out, width, per, padded)
        channel = _channel(place, group, per, vec)
        w, b = w0, b0
        if step > 0:
            w = tl.load(weight + channel).to(tl.float32)
            b = tl.load(bias + channel).to(tl.float32)
        y = (held[step] - mean) * (rstd * w) + b
        if silu:
            y = apply_silu(y)
        if padded:
            y = tl.where(inside, y, 0.0)
        at = (place // per) * (c_x + c_skip) + channel
        stored = (place < n_out * per) & (channel >= 0)
        tl.store(to + at, y.to(out.dtype.element_ty), mask=stored)
