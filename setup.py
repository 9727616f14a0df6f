"""Builds sdi_fast._C with CMake; everything else is in pyproject.toml.

Environment: SDI_FAST_CUDA = AUTO (default), ON, OFF; SDI_FAST_CUDA_ARCHS = "90" or "80;90", default
all that nvcc and sdi_fast know; CMAKE_ARGS = further arguments.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


setup(ext_modules=[Extension("sdi_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
