"""The CUDA kernels, run on the CPU by the emulator in tests/emulator (see its README)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import TESTS, run_child

EMULATOR = TESTS / "emulator"
sys.path.append(str(EMULATOR))

import emulated_build  # noqa: E402

pytestmark = pytest.mark.skipif(
    not emulated_build.can_build(), reason="the emulator needs Linux and g++ 12 or later"
)


def _try(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return run_child(*command, env={"OMP_NUM_THREADS": "1", **(env or {})})


@pytest.fixture(scope="session")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program that tests the emulator's parts."""
    program = tmp_path_factory.mktemp("emulator") / "selftest"
    return str(emulated_build.build_program([EMULATOR / "selftest.cpp"], program, []))


@pytest.fixture(scope="session")
def checked_selftest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with the address sanitizer."""
    program = tmp_path_factory.mktemp("emulator_checked") / "selftest"
    options = ["-fsanitize=address", "-g"]
    return str(emulated_build.build_program([EMULATOR / "selftest.cpp"], program, options))


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the extension with emulated kernels; SDI_FAST_EMULATED names one that is there."""
    given = os.environ.get("SDI_FAST_EMULATED")
    if given:
        return given
    return str(emulated_build.build_module(tmp_path_factory.mktemp("emulated"), []))


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_warps_barriers_memory_and_fragments(selftest: str, order: str) -> None:
    result = _try(selftest, env={"SDI_EMULATE_ORDER": order})
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "deadlock",
            r"deadlock: no thread can go on\n"
            r"  kernel .*deadlock_kernel\(\), block 1 of 64 threads\n"
            r"  40 threads waiting at __syncthreads, selftest.cpp:\d+ in deadlock_kernel "
            r"\(first: thread 0\)\n"
            r"  24 threads waiting at __syncwarp, mask 0xffffff01, selftest.cpp:\d+ .*\n",
        ),
        ("exited", r"thread 9: exits, but a lane of its warp waits for it in __shfl_xor_sync, "),
        ("absent", r"__ballot_sync: lane 20 of the mask has exited or does not exist, "),
        ("mixed", r"__syncwarp: lane 0 waits in another primitive, or with another mask or type, "),
        ("mask", r"thread 0: __syncwarp: the mask lacks the calling lane, "),
        ("misaligned_row", r"ldmatrix_x4: a row's address is no multiple of 16, "),
        ("misaligned_sum", r"red_add_v4: the address is no multiple of 16, "),
    ],
)
def test_what_hardware_leaves_undefined_is_an_error(
    selftest: str, kernel: str, message: str
) -> None:
    result = _try(selftest, kernel)
    assert result.returncode == 3, result.stdout  # kCudaError, and the next launch works
    assert re.search(r"^emulator: .*" + message, result.stdout, flags=re.MULTILINE), result.stdout


def test_dynamic_shared_memory_ends_where_it_says(selftest: str) -> None:
    result = _try(selftest, "overrun_dynamic")
    assert result.returncode == -signal.SIGSEGV
    expected = r"thread 5: memory fault at .*\n  kernel .*overrun_dynamic_kernel.*, block 0"
    assert re.search(expected, result.stdout), result.stdout


@pytest.mark.parametrize("memory", ["dynamic", "static", "global"])
def test_sanitizer_finds_overruns(checked_selftest: str, memory: str) -> None:
    result = _try(checked_selftest, f"overrun_{memory}")
    assert result.returncode not in (0, 3), result.stdout
    found = rf"SUMMARY: AddressSanitizer: .* in .*overrun_{memory}_kernel"
    assert re.search(found, result.stdout), result.stdout


def _emulated_pytest(module: str, *arguments: str) -> set[str]:
    """Runs tests on CPU tensors through the kernels that a GPU would run; what they called."""
    path = os.pathsep.join([str(EMULATOR), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    result = _try(
        *(sys.executable, "-m", "pytest", "-q", "-p", "emulated_plugin", *arguments),
        env={"SDI_FAST_EMULATED": module, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stdout[-4000:]
    (called,) = re.findall(r"^emulated: (.*)$", result.stdout, flags=re.MULTILINE)
    return set(called.split())


def test_ops_agree_with_their_twins(module: str) -> None:
    """The ops' own tests, on CPU tensors and through the kernels that a GPU would run."""
    files = [
        str(TESTS / f"test_ops_{part}.py")
        for part in ("dispatch", "field", "image", "samples", "ray_losses")
    ]
    called = _emulated_pytest(module, *files)
    called |= _emulated_pytest(module, str(TESTS / "test_guided_step.py"), "-k", "cpu")
    assert called == emulated_build.all_ops()


def test_fused_renderer_agrees_with_its_twin(module: str) -> None:
    parts = ("render_views", "render_views_deterministic", "reference_render_golden")
    files = [str(TESTS / f"test_{part}.py") for part in parts]
    _emulated_pytest(module, *files, "-k", "fused or render_views")
