"""Group norm in one launch: a program holds a group of a sample in registers.

Twin: group_norm of sdi_fast/reference/unet_ops.py; formula and choice: group_norm.py.

Mapping: the lanes run over the group's vectors of vec neighbouring channels (a group has 10 to 80
channels in a row, so that whole rows would leave lanes idle), 8 numbers a thread and step, all
steps' reads in flight at once. Mean first and then the deviations, in f32, from registers.

Bytes per element in f16: 2 read, 2 written; weight and bias, 8, come from L1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import silu as apply_silu


@triton.jit
def _channel(place: tl.tensor, group: tl.tensor, per: tl.constexpr, vec: tl.constexpr) -> tl.tensor:
    return group * (per * vec) + (place % per) * vec + tl.arange(0, vec)[None, :]


@triton.jit(do_not_specialize=("n_rows",))
def _group_norm_held(
    x: tl.tensor,  # [B, N, c_x]
    skip: tl.tensor,  # [B, N, c_skip] where has_skip
    shift: tl.tensor,  # [B or 1, C] where has_shift
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    out: tl.tensor,  # [B, N, C]
    n_rows: tl.tensor,  # N
    c_x: tl.tensor,
    c_skip: tl.tensor,
    shift_stride: tl.tensor,
    eps: tl.tensor,
    n_lanes: tl.constexpr,
    steps: tl.constexpr,
    per: tl.constexpr,  # vectors of a group in a row
    vec: tl.constexpr,
    exact: tl.constexpr,  # no lane is idle at any step
    has_skip: tl.constexpr,
    has_shift: tl.constexpr,
    silu: tl.constexpr,
) -> None:
    group = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, n_lanes)[:, None]
    n_places = n_rows * per
    first = x + sample * n_rows * c_x
    second = skip + sample * n_rows * c_skip
    held = ()
    total = tl.zeros([n_lanes, vec], tl.float32)
    for step in tl.static_range(steps):
        place = step * n_lanes + lanes  # index into the group's n_rows * per vectors
        row = place // per
        channel = _channel(place, group, per, vec)
        mask = (place < n_places) & (channel >= 0)  # of channel's shape
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
            off = tl.where(step * n_lanes + lanes < n_places, off, 0.0)
        squares += off * off
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / n + eps)
    to = out + sample * n_rows * (c_x + c_skip)
    for step in tl.static_range(steps):
        place = step * n_lanes + lanes
        channel = _channel(place, group, per, vec)
        w, b = w0, b0
        if step > 0:
            w = tl.load(weight + channel).to(tl.float32)
            b = tl.load(bias + channel).to(tl.float32)
        y = (held[step] - mean) * (rstd * w) + b
        if silu:
            y = apply_silu(y)
        at = (place // per) * (c_x + c_skip) + channel
        stored = (place < n_places) & (channel >= 0)
        tl.store(to + at, y.to(out.dtype.element_ty), mask=stored)
