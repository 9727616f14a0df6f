"""Builds sdi_fast._C with CMake and puts stored times of a step into the package; everything else
is in pyproject.toml.

Environment: SDI_FAST_CUDA = AUTO (default), ON, OFF; SDI_FAST_CUDA_ARCHS = "90" or "80;90", default
all that nvcc and sdi_fast know; CMAKE_ARGS = further arguments.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def version() -> str:
    text = (ROOT / "sdi_fast" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("sdi_fast/__init__.py: expected __version__")
    return match.group(1)


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, straight into the place setuptools expects."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # here, since only building needs it

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("SDI_FAST_CUDA_ARCHS", "").replace(",", ";")
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSDI_FAST_VERSION={version()}",
            f"-DSDI_FAST_CUDA={os.environ.get('SDI_FAST_CUDA', 'AUTO').upper()}",
            f"-DSDI_FAST_CUDA_ARCHS={archs}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True)


class BuildWithResults(build_py):
    """Brings what `sdi-fast bench` compares with; an editable install reads it where it is."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path, target in self.results().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)

    def results(self) -> dict[Path, Path]:
        folder = Path(self.build_lib) / "sdi_fast" / "bench" / "stored"
        found = sorted((ROOT / "benchmarks" / "results").glob("step_*.json"))
        return {path: folder / path.name for path in found}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        copied = [] if self.editable_mode else [str(target) for target in self.results().values()]
        return [*super().get_outputs(include_bytecode), *copied]


setup(
    ext_modules=[Extension("sdi_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildWithResults},
)
