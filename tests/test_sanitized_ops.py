"""The list of kernels that compute-sanitizer is given (tests/sanitized_ops.py) is complete."""

from __future__ import annotations

import re

import pytest
from conftest import TESTS


@pytest.mark.gpu
def test_every_op_is_run() -> None:
    import sanitized_ops

    listed = (TESTS.parent / "csrc" / "ops.h").read_text()
    ops = set(re.findall(r"^  X\((\w+), ", listed, flags=re.MULTILINE))
    assert len(ops) > 20
    fused = {"render_views_fwd", "render_views_bwd", "render_views_bwd_deterministic"}
    assert sanitized_ops.main() == ops | fused
