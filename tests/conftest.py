"""Fixtures shared by all tests: golden data and a small random field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small tests are slower on many

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: nothing above does that

from safetensors.torch import load_file
from torch import Tensor

from sdi_fast.types import FieldParams, FieldSpec, HashGridSpec

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
# Working folder of child processes. Python puts it first on their path, so that it must not be the
# source tree: they have to import the sdi_fast that these tests do, with its built extension.
CHILD_CWD = TESTS


def run_child(
    *command: str, env: dict[str, str] | None = None, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """A command with stdout and stderr together, in CHILD_CWD."""
    return subprocess.run(
        command,
        cwd=CHILD_CWD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=timeout,
    )


def compile_in_child(code: str, cache: Path) -> None:
    """Runs code that compiles Triton kernels and ends with print("compiled"), without a GPU and
    without the interpreter, which takes what the compiler refuses and knows no PTX."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHILD_CWD,
        env=env | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert child.stdout.endswith("compiled\n"), child.stderr


# FieldParams' members and EnvironmentBackground's, as the golden data names them
GOLDEN_FIELD_NAMES = {
    "table": "grid",
    "density_w1": "geometry.density_network.layers.0.weight",
    "density_w2": "geometry.density_network.layers.2.weight",
    "color_w1": "geometry.feature_network.layers.0.weight",
    "color_w2": "geometry.feature_network.layers.2.weight",
}
GOLDEN_BACKGROUND_NAMES = {
    "w1": "background.network.layers.0.weight",
    "w2": "background.network.layers.2.weight",
    "w3": "background.network.layers.4.weight",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than 20 s")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Torch's default generator in the same state at every test's start, whatever ran before."""
    torch.manual_seed(0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error in f64; the norm itself where `expected` is zero."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale or 1.0)


def random_field(
    spec: FieldSpec, *, dtype: torch.dtype = torch.float32, seed: int = 0, table_std: float = 0.5
) -> FieldParams:
    """Parameters far from initialisation, so that every term of the field matters."""
    generator = torch.Generator().manual_seed(seed)
    grid, hidden = spec.grid, spec.hidden

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    width = grid.n_output_dims
    return FieldParams(
        table=normal(grid.n_params, std=table_std),
        density_w1=normal(hidden, width, std=width**-0.5),
        density_w2=normal(1, hidden, std=2 * hidden**-0.5),
        color_w1=normal(hidden, width, std=width**-0.5),
        color_w2=normal(3, hidden, std=2 * hidden**-0.5),
    )


@pytest.fixture(scope="session")
def golden_render() -> dict[str, Tensor]:
    """Tensors of tests/golden/render (see its README). Do not change them in place."""
    return load_file(GOLDEN / "render" / "render.safetensors")


@pytest.fixture(scope="session")
def golden_render_cases() -> dict[str, Any]:
    return json.loads((GOLDEN / "render" / "render_cases.json").read_text())


@pytest.fixture(scope="session")
def golden_guidance() -> dict[str, Tensor]:
    """Tensors of tests/golden/guidance (see its README). Do not change them in place."""
    return load_file(GOLDEN / "guidance" / "guidance.safetensors")


@pytest.fixture(scope="session")
def golden_guidance_cases() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "guidance" / "guidance_cases.json").read_text())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model in Stable Diffusion's layout; to be read alone."""
    from tiny_sd import make_tiny_sd

    return make_tiny_sd(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def golden_spec(golden_render_cases: dict[str, Any]) -> FieldSpec:
    """The golden field's geometry."""
    grid = golden_render_cases["config"]["pos_encoding_config"]
    return FieldSpec(
        HashGridSpec(
            grid["n_levels"],
            grid["n_features_per_level"],
            grid["log2_hashmap_size"],
            grid["base_resolution"],
            grid["per_level_scale"],
        )
    )


@pytest.fixture(scope="session")
def small_spec() -> FieldSpec:
    """4 levels of which 2 are hashed; 16 hidden units."""
    return FieldSpec(HashGridSpec(4, 2, 10, 5, 1.7), hidden=16)


@pytest.fixture
def small_params(small_spec: FieldSpec) -> FieldParams:
    """f64 leaves that require gradients, for `small_spec`."""
    params = random_field(small_spec, dtype=torch.float64)
    for tensor in params.tensors():
        tensor.requires_grad_()
    return params
