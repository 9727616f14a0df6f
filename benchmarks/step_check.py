"""Whether a candidate computes what the baseline does, before anything of it is timed.

One view, no noise in the guidance, no jitter along the rays, learning rates of 0: then both
compute the same numbers, but for their precision. The candidate steps first; the baseline takes
over its parameters and occupancy grid and steps from there.

Allowed: the losses of the images LOSS_TOLERANCE (both render in f16 on a GPU, images differ by
2e-3 at most), the guidance GUIDANCE_TOLERANCE (two f16 UNets through up to 12 calls, whose errors
the guidance scale multiplies; exact mode was off by up to 4e-2 in four runs on an H200, which
differ by the algorithms that cuDNN took for the fastest), gradients GRADIENT_TOLERANCE: with
random cotangents the table's were off by 5e-2 (nerfacc) and 2e-2 (ours) from f32
(results/render_h200.json), and here cotangents partly cancel. A wrong sign or a missing term is
0.3 and more.
"""

from __future__ import annotations

from typing import Any

import torch
from baseline import BaselineStep
from harness import relative_error
from torch import Tensor

from sdi_fast.bench.timing import synchronize
from sdi_fast.config import Config
from sdi_fast.diffusion.pipeline import Pipeline
from sdi_fast.engine import Engine

DELTA = 37
N_STEPS = 3  # the last one is compared: graphs may be captured in the first ones
LOSS_TOLERANCE, GUIDANCE_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 0.1, 0.25
LOSS_FLOOR = 0.05  # added to a loss that its error is compared with: convexity may be near zero
FIELD = "exp_avg.field."


class CheckError(AssertionError):
    """A candidate that computes something else."""


def first_moments(engine: Engine) -> dict[str, Tensor]:
    """Adam's first moments of the field, copied; waits for the step in hand."""
    synchronize(engine.device)
    state = engine.optimizer.state_dict()
    return {k.removeprefix(FIELD): v.clone() for k, v in state.items() if k.startswith(FIELD)}


def step_and_gradients(engine: Engine, t: int) -> tuple[Any, dict[str, Tensor]]:
    """N_STEPS at t: the last one's metrics, and its gradients as Adam took them."""
    before: dict[str, Tensor] = {}
    for _ in range(N_STEPS):
        before = first_moments(engine)
        metrics = engine.step(t=t, delta=DELTA)
    beta = engine.config.optim.betas[0]
    after = first_moments(engine)
    return metrics, {k: (after[k] - beta * before[k]) / (1.0 - beta) for k in after}


def check_candidate(
    config: Config,  # of the candidate, as `still` and `without_noise` leave it
    pipeline: Pipeline,
    baseline: BaselineStep,  # with the same config
    t_steps: tuple[int, ...],
    factor: float = 1.0,  # of the tolerances
) -> list[dict[str, Any]]:
    """Errors by t. An approximate inversion's own, guidance and gradients, are told, not bounded.

    Raises:
        CheckError: above the tolerances.
    """
    engine = Engine(config, pipeline=pipeline)
    exact = config.guidance.shortcuts.exact
    rows = []
    for t in t_steps:
        metrics, gradients = step_and_gradients(engine, t)
        baseline.adopt(
            engine.field.state_dict(),
            engine.background.state_dict(),
            engine.occupancy.state_dict(),
            int(metrics.step),
        )
        expected = baseline.step(t, DELTA)
        row = _errors(metrics, gradients, expected, baseline)
        row["t"] = t
        row["failed"] = _failures(row, exact, factor)
        rows.append(row)
        if row["failed"] or metrics.skipped:
            why = row["failed"] or ["a step was skipped"]
            raise CheckError(f"t = {t}: {', '.join(why)}: {row}")
    return rows


def _errors(
    metrics: Any, gradients: dict[str, Tensor], expected: dict[str, Any], baseline: BaselineStep
) -> dict[str, Any]:
    ours, theirs = dict(metrics.losses), expected["losses"]
    losses = {k: abs(float(ours[k]) - v) / (abs(v) + LOSS_FLOOR) for k, v in theirs.items()}
    by_name = {}
    for name, parameter in baseline.field.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        by_name[name] = relative_error(gradients[name].to(grad.device), grad)
    return {
        "losses": losses,
        "gradients": by_name,
        "n_samples": [int(metrics.n_samples), expected["n_samples"]],
    }


def _failures(row: dict[str, Any], exact: bool, factor: float) -> list[str]:
    """What is above its tolerance; NaN is."""
    failed = []
    for name, error in row["losses"].items():
        allowed = GUIDANCE_TOLERANCE if name == "guidance" else LOSS_TOLERANCE
        if (exact or name != "guidance") and not error <= factor * allowed:
            failed.append(f"loss {name}")
    for name, error in row["gradients"].items():
        allowed = factor * GRADIENT_TOLERANCE if exact else float("inf")
        if not error <= allowed:
            failed.append(f"gradient {name}")
    return failed
