"""The machine code of the CPU loops: vectors that fit no register go through the stack, many times slower."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path

import machine_code
import pytest

from lora_kernels import _extension

HERE = Path(__file__).parent
CPU = HERE.parents[1] / "csrc" / "cpu"
PASSES = sorted(CPU.glob("*_pass.cpp"))
# Whole vectors to or from a fixed place on the stack, by vector instruction of an innermost loop. Vectors
# wider than a register were at 0.4 to 0.85; a spilled constant here and there is at 0.18.
BOUND = 0.2
# The rounding to bfloat16 after these is gcc's own loop for AVX-512, whose constants lie on the stack.
ROUNDING = {("avx512", "split_f32(Splitting const&)"), ("avx512", "keep_f32(Keeping const&)")}
# Two types of numbers each, but for the loops on float32 alone.
LOOPS = {"accumulate": 2, "expand": 2, "norms": 2, "transpose": 2, "run": 4, "split_f32": 1, "split_f64": 1}
LOOPS |= {"keep_f32": 1, "keep_f64": 1, "dots": 3, "mix": 2, "mix_add": 2, "outer_pages": 2, "turn": 2}
LOOPS |= {"subtract_chunk": 1, "replace_piece": 1, "pack_rows": 1, "multiply_panels": 1, "decode": 1}
LOOPS |= {"fill_bytes": 1, "drop": 2, "open_tile": 2, "close_tile": 2, "apply_gate": 2, "sum_gate": 2}
CROSS_COMPILER, CROSS_OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
EMULATOR = "qemu-aarch64"


def missing(*tools):
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return f"{', '.join(absent)} not found" if absent else None


def check(loops, version):
    """Every loop is there, and none goes through the stack."""
    own = [loop for loop in loops if loop.version == version]
    for name, count in LOOPS.items():
        assert sum(loop.name.startswith(f"{name}(") for loop in own) == count, name
    over = {loop.name: round(loop.share, 2) for loop in own if loop.share > BOUND}
    assert not {name: share for name, share in over.items() if (version, name) not in ROUNDING}


@pytest.fixture(scope="module")
def extension_loops():
    if reason := _extension.load() or missing("objdump"):
        pytest.skip(reason)
    path = Path(importlib.import_module("lora_kernels._C").__file__)
    text = machine_code.disassemble(path)
    if "%rsp" not in text:
        pytest.skip("not an x86-64 extension")
    if "__asan_" in text:
        pytest.skip("sanitised code is not what runs elsewhere")
    return machine_code.loops_of(text, machine_code.X86)


@pytest.mark.parametrize("version", ["avx512", "avx2", "sse2"])
def test_no_loop_of_the_extension_goes_through_the_stack(extension_loops, version):
    check(extension_loops, version)


def compile_for_aarch64(folder):
    sources = [*PASSES, CPU / "version.cpp", HERE / "cpu_loops_check.cpp"]
    flags = ("-std=c++20", "-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-static")
    command = [CROSS_COMPILER, *flags, *map(str, sources), "-o", str(folder / "check")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def aarch64_program(made_once):
    """The loops for 64-bit Arm, and a program that holds each against a plain one."""
    if reason := missing(CROSS_COMPILER, CROSS_OBJDUMP):
        pytest.skip(reason)
    return made_once("aarch64", compile_for_aarch64) / "check"


@pytest.mark.exhaustive  # half a minute of compiling
def test_no_loop_for_aarch64_goes_through_the_stack(aarch64_program):
    text = machine_code.disassemble(aarch64_program, CROSS_OBJDUMP)
    check(machine_code.loops_of(text, machine_code.ARM), "neon")


@pytest.mark.exhaustive
def test_the_loops_for_aarch64_are_right(aarch64_program):
    if reason := missing(EMULATOR):
        pytest.skip(reason)
    command = [EMULATOR, str(aarch64_program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "neon\n")


SPILLED = """
0000 <lora_kernels::avx2::mix(lora_kernels::Mix<float> const&)>:
   0:\tvmovaps (%rax),%ymm0
   4:\tvmovaps %ymm0,0x20(%rsp)
   8:\tvmovss 0x40(%rsp),%xmm1
   c:\tvfmadd231ps (%rsp,%rcx,4),%ymm0,%ymm1
  10:\tjne    4 <lora_kernels::avx2::mix(lora_kernels::Mix<float> const&)+0x4>
"""


def test_what_is_counted():
    (loop,) = machine_code.loops_of(SPILLED, machine_code.X86)
    assert (loop.name, loop.stack_accesses, loop.vector_instructions) == ("mix(Mix<float> const&)", 1, 2)
