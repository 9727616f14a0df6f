"""The extension as a file, its instruction sets, and the build's behaviour around nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import run_child

import sdi_fast
from sdi_fast.ops import _native

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ("pybind11", "cmake", "ninja")  # in the extra "test"


def _run(*command: str, env: dict[str, str] | None = None, timeout: int = 300) -> str:
    """stdout and stderr of a command that has to succeed."""
    result = run_child(*command, env=env, timeout=timeout)
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def _extension_file() -> str:
    return str(_native.extension().__file__)


def test_build_info_tells_what_doctor_prints() -> None:
    info = _native.build_info()
    assert info["version"] == sdi_fast.__version__
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512")
    assert re.match(r"\w+ \d+\.\d+", info["compiler"])
    assert bool(info["cuda_archs"]) == bool(info["nvcc"]) == _native.has_cuda()


@pytest.mark.skipif(sys.platform != "linux", reason="ELF files")
def test_extension_stands_alone() -> None:
    """No torch, no CUDA driver, no C++ streams at load; nothing exported but the module."""
    dynamic = _run("readelf", "-d", _extension_file())
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed
    assert not [n for n in needed if re.match(r"lib(torch|c10|cuda|cudart|python)", n)]
    symbols = _run("nm", "-D", "--defined-only", _extension_file()).splitlines()
    exported = [line.split()[-1] for line in symbols]
    # weak typeinfo of the standard library may be shared; names of ours may not
    assert [n for n in exported if n.startswith("PyInit")] == ["PyInit__C"]
    assert not [n for n in exported if "sdi" in n.lower() or "launch" in n]


@pytest.mark.skipif(sys.platform != "linux", reason="shared objects")
def test_torch_and_the_ops_share_one_openmp() -> None:
    shipped = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not shipped:  # a torch that was built against the system's own
        assert _native.build_info()["openmp_runtime"]
        return
    assert Path(_native.build_info()["openmp_runtime"]).resolve() in [s.resolve() for s in shipped]


def test_no_iostreams_in_the_sources() -> None:
    files = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cpp", ".cu")]
    assert len(files) > 20
    streams = re.compile(r"<(i|o|io|s|f)stream>|std::c(out|err)")
    assert not [f.name for f in files if streams.search(f.read_text())]


def test_kernel_files_open_with_what_they_do() -> None:
    kernels = [*(ROOT / "csrc/cpu").glob("*.cpp"), *(ROOT / "csrc/cuda").glob("*.cu")]
    for file in kernels:
        if file.name in ("dispatch.cpp", "table.cpp"):  # no kernels
            continue
        opening = file.read_text().split("#include")[0]
        for word in ("methods.md", "sdi_fast/reference/", "Precision: "):
            assert word in opening, f"{file.name}: {word}"


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets_agree_with_the_twins(isa: str) -> None:
    if isa != "baseline" and _native.build_info()["cpu_isa"] == "baseline":
        pytest.skip("this processor has no AVX2")
    env = {"SDI_FAST_ISA": isa, "OMP_NUM_THREADS": "1"}
    probe = "from sdi_fast.ops import _native; print(_native.build_info()['cpu_isa'])"
    assert _run(sys.executable, "-c", f"import torch; {probe}", env=env).split()[-1] == isa
    names = ("field", "image", "ray_losses", "samples")
    files = [f"test_ops_{name}.py" for name in names]
    paths = [str(ROOT / "tests" / f) for f in files]
    chosen = "matches or rule or twins"
    out = _run(sys.executable, "-m", "pytest", "-q", "-k", chosen, *paths, env=env)
    assert int(re.search(r"(\d+) passed", out)[1]) > 30  # type: ignore[index]


def _configure(build: Path, mode: str, nvcc: Path) -> subprocess.CompletedProcess[str]:
    for tool in BUILD_TOOLS[1:]:
        assert shutil.which(tool), f"{tool}: install the extra 'test'"
    import pybind11

    return run_child(
        "cmake",
        f"-S{ROOT}",
        f"-B{build}",
        "-GNinja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DSDI_FAST_CUDA={mode}",
        f"-DSDI_NVCC={nvcc}",
    )


@pytest.mark.parametrize("script", ["exit 1", "echo nvcc: release 13.0, V13.0.0", None])
def test_a_broken_nvcc_does_not_break_the_cpu_build(tmp_path: Path, script: str | None) -> None:
    nvcc = tmp_path / "nvcc"
    if script:
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755)
    result = _configure(tmp_path / "auto", "AUTO", nvcc)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "building without CUDA kernels" in result.stdout


def test_cuda_on_insists_on_a_working_nvcc(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    result = _configure(tmp_path / "on", "ON", nvcc)
    assert result.returncode != 0
    assert "no working nvcc was found" in result.stdout


@pytest.mark.slow
def test_wheel_holds_all_that_runs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    _run(*pip, "-w", str(tmp_path), str(source), env={"SDI_FAST_CUDA": "OFF"}, timeout=550)
    (wheel,) = tmp_path.glob("sdi_fast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if re.match(r"sdi_fast/_C\..*(so|pyd)$", n)]
    assert "sdi_fast/toyworld/weights/unet/config.json" in names
    stored = [p.name for p in (ROOT / "benchmarks/results").glob("step_*.json")]
    assert {f"sdi_fast/bench/stored/{name}" for name in stored} <= set(names)
    assert {n.split("/")[0].split("-")[0] for n in names} == {"sdi_fast"}
    packages = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "sdi_fast").rglob("*.py")}
    assert packages <= {str(Path(n).parent.as_posix()) for n in names}
