"""Every CUDA kernel once, at small and odd sizes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/sanitized_ops.py
    compute-sanitizer --tool racecheck python tests/sanitized_ops.py
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # lest initcheck takes old contents for written ones
    compute-sanitizer --tool initcheck python tests/sanitized_ops.py

Inputs are made on the CPU and nothing is compared: the tests do that, and under a sanitizer the
twins would take hours. tests/test_sanitized_ops.py checks that no op is missing.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any
from unittest import mock

import torch
from fused_cases import fused, repeating
from ops_cases import rand, random_samples, rays_at
from test_guided_step import SHAPES, SPEC, T_NEXT, case, ours
from test_ops_cuda import CASES
from test_ops_cuda_training import (
    adam_state,
    first_step,
    occupancy_inputs,
    run_convexity,
    run_ray_losses,
    sparse_grad,
)
from test_render_views import (
    SHADINGS,
    make_camera,
    make_jitter,
    make_scene,
    random_cotangents,
)

from sdi_fast.ops import _native
from sdi_fast.ops.background import background
from sdi_fast.ops.march import march
from sdi_fast.ops.occupancy import update_occupancy
from sdi_fast.ops.prune import prune
from sdi_fast.types import Samples

SKIPPED = ("n20003", "n5000", "widest", "ragged")  # the same kernels, only longer
DTYPES = (torch.float32, torch.float64)


def run_table() -> None:
    """Field, hash encoding, shading, compositing, forward and backward."""
    for name, build in CASES.items():
        if not any(part in name for part in SKIPPED):
            for dtype in DTYPES:
                build(dtype, "cuda").results()


def run_samples(dtype: torch.dtype) -> None:
    origins, directions = (t.cuda() for t in rays_at(37, dtype))
    occupancy = (rand(8, 8, 8, seed=1) > 0.4).cuda()
    jitter = (rand(37, seed=2, dtype=dtype) * 0.05).cuda()
    samples = march(origins, directions, occupancy, 2.0, 0.05, 0.1, jitter, backend="cuda")
    density = (rand(samples.n_samples, seed=3, dtype=dtype) * 10).cuda()
    prune(samples, density, 1e-4, 0.01, backend="cuda")
    made = random_samples([0, 1, 40, 0, 7], dtype=dtype)
    there = Samples(*(t.cuda() for t in (made.ray_indices, made.t_starts, made.t_ends,
                                         made.packed_info)))  # fmt: skip
    prune(there, rand(48, seed=4, dtype=dtype).cuda(), 1e-4, 0.01, backend="cuda")


def run_training(dtype: torch.dtype) -> None:
    occs, cells, values = occupancy_inputs(700, dtype, side=8)
    update_occupancy(occs, cells, values, 0.95, 0.01, backend="cuda")
    for n in (1, 7, 1025):
        first_step([*adam_state(n, dtype), sparse_grad(n, 1, dtype)])
        shifted = [*adam_state(n + 1, dtype), sparse_grad(n + 1, 1, dtype)]
        first_step([t[1:] for t in shifted])  # off the vectors' alignment
        run_ray_losses(n, dtype, "cuda")
    weights = [rand(*s, dtype=dtype).cuda().requires_grad_() for s in ((16, 9), (16, 16), (3, 16))]
    for n in (0, 1, 65):
        directions = torch.nn.functional.normalize(rand(n, 3, seed=5, dtype=dtype) - 0.5, dim=-1)
        background(directions.cuda(), *weights, backend="cuda").sum().backward()


def run_guided(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for k in (2, 4):
            c = case(shape, k, dtype)
            ours(c, SPEC, T_NEXT, "cuda", noise=c["noise"])
            ours(c, SPEC, None, "cuda")
            ours(c, SPEC, T_NEXT, "cuda", rng=torch.tensor([5, 7]))
            for half in (torch.float16, torch.bfloat16) if dtype == torch.float32 else ():
                ours(
                    {**c, "outputs": c["outputs"].to(half)}, SPEC, T_NEXT, "cuda", noise=c["noise"]
                )


def run_fused() -> None:
    for kind in ("blob", "shell", "random"):
        scene = make_scene(kind)
        for size, shading in zip(((1, 5, 9), (2, 8, 7), (1, 1, 1)), SHADINGS, strict=True):
            camera = make_camera(*size)
            jitter = make_jitter(camera, scene.marching)
            for function in (fused, repeating):
                cotangents = random_cotangents(camera)
                scene.run(function, camera, shading, torch.float32, jitter, cotangents)
            scene.run(fused, camera, shading, torch.float32)


def main() -> set[str]:
    """Runs them all; the ops that were called."""
    called: set[str] = set()

    def watched(op: str, *args: Any, **options: Any) -> None:
        called.add(op)
        _native.call(op, *args, **options)

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("sdi_fast.ops.") and module is not _native:
                if hasattr(module, "call"):
                    stack.enter_context(mock.patch.object(module, "call", watched))
        run_table()
        for dtype in DTYPES:
            run_samples(dtype)
            run_training(dtype)
            run_guided(dtype)
            for frame in ("world", "camera"):
                for n_views in (1, 2):
                    run_convexity((n_views, 9, 11), frame, dtype, "cuda")
        run_fused()
        torch.cuda.synchronize()
    return called


if __name__ == "__main__":
    print(" ".join(sorted(main())))
