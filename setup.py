"""Builds the optional extension ``lora_kernels._C``; without a compiler the install is pure Python.

It has the CPU kernels, and the CUDA kernels where there are nvcc and a torch with CUDA.

LORA_KERNELS_FORCE_BUILD=1   a build that fails is an error
LORA_KERNELS_SKIP_BUILD=1    no build is tried
LORA_KERNELS_SANITIZE=1      with AddressSanitizer and UBSan; `make sanitize` runs the tests on that
TORCH_CUDA_ARCH_LIST         the cards to compile for, as for any extension of torch; where no card is
                             visible either, CUDA_ARCHITECTURES below
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
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
SANITIZE = SANITIZERS if os.environ.get("LORA_KERNELS_SANITIZE") == "1" else []
# torch's own headers do not pass -Wunused-parameter.
COMPILE_FLAGS = [
    "-O3",
    "-g0",  # Python's own flags have -g, which makes the build slower and the library ten times as large
    "-std=c++20",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-parameter",
    *OPENMP,
    # Sanitised code is larger, and looks to the compiler as if it read what was not written.
    *(["-O1", "-g", "-fno-omit-frame-pointer", "-Wno-maybe-uninitialized", *SANITIZE] if SANITIZE else []),
]
NVCC_FLAGS = ["-O3", "-std=c++20", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
# One launch with clusters from 9.0 on, two launches before; newer cards compile the last one's PTX.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


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


def cuda_home() -> Path | None:
    """Where CUDA is installed with its headers, by CUDA_HOME or nvcc's place."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None]
    for place in filter(None, [*places, "/usr/local/cuda"]):
        if (Path(place) / "bin" / "nvcc").exists() and (Path(place) / "include/cuda_runtime_api.h").exists():
            return Path(place)
    return None


def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot be built here, or ``None``."""
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return None if cuda_home() else "nvcc was not found"


def sources(cuda: bool) -> list[str]:
    """What is compiled: ``csrc/cuda`` with CUDA alone."""
    kinds = (".cpp", ".cu") if cuda else (".cpp",)
    files = (path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds)
    return sorted(str(path) for path in files if cuda or path.parts[1] != "cuda")


def extension(cuda: bool) -> Extension:
    """``lora_kernels._C`` with torch's flags and ours."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    kind, flags = CppExtension, {"cxx": COMPILE_FLAGS}
    if cuda:
        kind, flags = CUDAExtension, {"cxx": COMPILE_FLAGS, "nvcc": NVCC_FLAGS}
    return kind(
        "lora_kernels._C", sources(cuda), extra_compile_args=flags, extra_link_args=[*OPENMP, *SANITIZE]
    )


def prepare_cuda() -> None:
    """What torch's builder reads from the environment: where CUDA is, and for which cards to compile."""
    os.environ.setdefault("CUDA_HOME", str(cuda_home()))
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)


class OptionalBuild(build_ext):
    """Builds what can be built; a failure becomes one warning, or an error under FORCE_BUILD."""

    def run(self) -> None:
        reason = compiler_missing()
        if reason is None:
            reason = self._try(cuda=True) if cuda_missing() is None else self._try(cuda=False)
        if reason is None:
            return
        if FORCE:
            raise RuntimeError(f"LORA_KERNELS_FORCE_BUILD=1, and the extension was not built: {reason}")
        if compiler_missing() is None and cuda_missing() is None and self._try(cuda=False) is None:
            warnings.warn(f"lora-kernels is installed without its CUDA kernels: {reason}", stacklevel=1)
            return
        warnings.warn(f"lora-kernels is installed without its C++ extension: {reason}", stacklevel=1)
        self.extensions = []

    def _try(self, cuda: bool) -> str | None:
        """Builds. Returns why that failed, or ``None``."""
        try:
            self._build_with_torch(cuda)
        except Exception as error:  # any compiler error: the pure-Python install still works
            return f"the build failed: {error}"
        return None

    def _build_with_torch(self, cuda: bool) -> None:
        if cuda:
            prepare_cuda()
        from torch.utils.cpp_extension import BuildExtension

        self.distribution.ext_modules = [extension(cuda)]
        command = BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)(self.distribution)
        command.inplace, command.build_lib, command.build_temp = self.inplace, self.build_lib, self.build_temp
        command.ensure_finalized()
        command.run()


setup(
    ext_modules=[] if SKIP else [Extension("lora_kernels._C", [])],
    cmdclass={"build_ext": OptionalBuild},
)
