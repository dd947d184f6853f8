"""Builds the optional extension ``lora_kernels._C``; without a compiler the install is pure Python.

LORA_KERNELS_FORCE_BUILD=1   a build that fails is an error
LORA_KERNELS_SKIP_BUILD=1    no build is tried
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FORCE = os.environ.get("LORA_KERNELS_FORCE_BUILD") == "1"
SKIP = os.environ.get("LORA_KERNELS_SKIP_BUILD") == "1"
# Without this at::parallel_for runs on one thread; the runtime is the one that torch loaded.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
# torch's own headers do not pass -Wunused-parameter.
COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-parameter",
    *OPENMP,
]


def compiler_missing() -> str | None:
    """Why the extension cannot be built here, or ``None``."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler}) was found"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed where the build runs (use --no-build-isolation)"
    return None


class OptionalBuild(build_ext):
    """Builds with torch's flags; a failure becomes one warning, or an error under FORCE_BUILD."""

    def run(self) -> None:
        reason = compiler_missing()
        if reason is None:
            try:
                self._build_with_torch()
                return
            except Exception as error:  # any compiler error: the pure-Python install still works
                reason = f"the build failed: {error}"
        if FORCE:
            raise RuntimeError(f"LORA_KERNELS_FORCE_BUILD=1, and the extension was not built: {reason}")
        warnings.warn(f"lora-kernels is installed without its C++ extension: {reason}", stacklevel=1)
        self.extensions = []

    def _build_with_torch(self) -> None:
        from torch.utils.cpp_extension import BuildExtension, CppExtension

        sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
        self.distribution.ext_modules = [
            CppExtension(
                "lora_kernels._C",
                sources,
                extra_compile_args=COMPILE_FLAGS,
                extra_link_args=OPENMP,
            )
        ]
        command = BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)(self.distribution)
        command.inplace, command.build_lib, command.build_temp = self.inplace, self.build_lib, self.build_temp
        command.ensure_finalized()
        command.run()


setup(
    ext_modules=[] if SKIP else [Extension("lora_kernels._C", [])],
    cmdclass={"build_ext": OptionalBuild},
)
