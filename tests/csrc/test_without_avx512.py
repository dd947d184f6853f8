"""What hides AVX-512 from every library: `make test-avx2` runs the suite under it."""

import os
import platform
import shutil
import subprocess
import sys

import pytest

from tests.csrc import without_avx512

PROGRAM = """
import faulthandler
faulthandler.enable()  # takes SIGSEGV, as pytest does
import torch
from lora_kernels import _cpu_version, _extension
print(torch.backends.cpu.get_cpu_capability(), *(() if _extension.load() else _cpu_version.runnable()))
"""
pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="for Linux on x86-64"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


def run(program, variables):
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("ATEN_", "LORA_KERNELS_", "LD_", "GLIBC_"))
    }
    hidden = dict(one.split("=", 1) for one in variables)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=kept | hidden, capture_output=True, text=True)


def test_no_library_sees_avx512(tmp_path):
    library = without_avx512.built("without_avx512", tmp_path)
    if not without_avx512.faults(library):
        pytest.skip("this kernel or processor cannot let CPUID fault")
    done = run(PROGRAM, [f"LD_PRELOAD={library}"])
    assert done.returncode == 0, done.stderr
    assert "512" not in done.stdout and "AVX2" in done.stdout, done.stdout


ASKING = """
#include <cpuid.h>
unsigned wide(void) {
  unsigned a, b = 0, c, d;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  return b >> 16 & 1;  /* AVX-512F */
}
unsigned vectors(void) {
  unsigned a, b = 0, c, d;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  return b >> 5 & 1;  /* AVX2 */
}
unsigned other(void) { return 0xa20f; }  /* the instruction's bytes as a number */
"""


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_a_library_with_breakpoints_sees_none_either(tmp_path):
    source, library, listed = tmp_path / "asking.c", tmp_path / "asking.so", tmp_path / "sites"
    source.write_text(ASKING)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    offsets = without_avx512.offsets(library)
    assert 2 <= len(offsets) <= library.read_bytes().count(without_avx512.CPUID) - 1
    listed.write_text("".join(f"{library}\t{offset}\n" for offset in offsets))
    audit = without_avx512.built("trapped_cpuid", tmp_path)
    program = f"""
import ctypes
asking = ctypes.CDLL({str(library)!r})
print(asking.wide(), asking.vectors(), hex(asking.other()))
"""
    plain = run(program, []).stdout.split()
    done = run(program, [f"LD_AUDIT={audit}", f"CPUID_SITES={listed}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", plain[1], "0xa20f"]
    listed.write_text(f"{library}\t0\n")
    assert "the list is not of this" in run(program, [f"LD_AUDIT={audit}", f"CPUID_SITES={listed}"]).stderr
