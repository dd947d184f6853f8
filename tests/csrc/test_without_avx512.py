"""What hides AVX-512 from every library: `make test-avx2` runs the suite under it."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("without_avx512.c")
PROGRAM = """
import faulthandler
faulthandler.enable()  # takes SIGSEGV, as pytest does
import torch
from lora_kernels import _cpu_version, _extension
print(torch.backends.cpu.get_cpu_capability(), *(() if _extension.load() else _cpu_version.runnable()))
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="for Linux on x86-64")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_no_library_sees_avx512(tmp_path):
    built = tmp_path / "without_avx512.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(built), "-ldl"], check=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ATEN_", "LORA_KERNELS_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"LD_PRELOAD": str(built)},
        capture_output=True,
        text=True,
    )
    if "cannot let CPUID fault" in done.stderr:
        pytest.skip("this kernel or processor cannot let CPUID fault")
    assert done.returncode == 0, done.stderr
    assert "512" not in done.stdout and "AVX2" in done.stdout, done.stdout
