"""Builds sdi_fast._C with the CUDA kernels compiled for the CPU (see README.md in this folder).

python tests/emulator/emulated_build.py FOLDER [g++ flags, say -fsanitize=address -g]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"

FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",  # line tables: the emulator names the kernel that failed
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # CUDA code reads memory as vectors
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-DSDI_EMULATE",
    f"-I{HERE / 'include'}",
)


def all_ops() -> set[str]:
    return set(re.findall(r"^  X\((\w+), ", (CSRC / "ops.h").read_text(), flags=re.MULTILINE))


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def can_build() -> bool:
    """Whether there is a compiler that knows halves, for Linux."""
    if not sys.platform.startswith("linux") or shutil.which(compiler()) is None:
        return False
    command = [compiler(), "-std=c++17", f"-I{HERE / 'include'}", "-fsyntax-only", "-x", "c++"]
    header = str(HERE / "include" / "cuda_fp16.h")
    return subprocess.run([*command, header], capture_output=True).returncode == 0


def processor_flags() -> list[str]:
    """Conversions of halves in hardware, where this machine has them."""
    try:
        has_f16c = " f16c " in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_f16c = False
    return ["-mf16c"] if has_f16c else []


def flags() -> list[str]:
    return [*FLAGS, *processor_flags()]


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-8000:]}")


def compile_all(sources: list[Path], folder: Path, extra: list[str]) -> list[Path]:
    """Objects of `sources` in `folder`; those newer than everything they may include are kept."""
    headers = [*CSRC.rglob("*.h"), *HERE.rglob("*.h"), Path(__file__)]
    newest = max(f.stat().st_mtime for f in headers)

    def compile_one(source: Path) -> Path:
        made = folder / (source.name + ".o")
        if made.exists() and made.stat().st_mtime > max(newest, source.stat().st_mtime):
            return made
        run([compiler(), *flags(), *extra, "-x", "c++", "-c", str(source), "-o", str(made)])
        return made

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def build_program(sources: list[Path], program: Path, extra: list[str]) -> Path:
    """A stand-alone program from C++ and CUDA sources."""
    objects = compile_all(sources, program.parent / "objects", extra)
    run([compiler(), *extra, *map(str, objects), "-o", str(program), "-ldl", "-pthread"])
    return program


def build_module(folder: Path, extra: list[str]) -> Path:
    """The extension, in `folder`."""
    import pybind11

    options = [
        *extra,
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
        "-DSDI_FAST_WITH_CUDA",
        '-DSDI_FAST_VERSION="0.0.0"',
        '-DSDI_FAST_COMPILER="g++ 0.0"',
        '-DSDI_FAST_CUDA_ARCHS="emulated"',
        '-DSDI_FAST_NVCC="emulated"',
    ]
    # bindings first: they take longest
    sources = [CSRC / "bindings.cpp", HERE / "no_cpu.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    objects = compile_all(sources, folder / "objects", options)
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    run([compiler(), "-shared", *extra, *map(str, objects), "-o", str(module), "-ldl", "-pthread"])
    return module


if __name__ == "__main__":
    print(build_module(Path(sys.argv[1]), sys.argv[2:]))
