"""Compiles the CUDA sources of ``csrc/cuda`` with no card, and reads what the assembler made of them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A checkout has the sources beside the package; an installed wheel has none.
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ("-O3", "-std=c++20", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror")
TARGETS = ("80", "90a")
COLUMNS = ("kernel", "dtype", "rows", "target", "registers", "shared", "spills")
# What is looked for in the machine code: the field's name and the instruction.
INSTRUCTIONS = {
    "mma": r"HMMA",
    "matrix_loads": r"LDSM",
    "bulk_copies": r"UBLKCP",
    "async_copies": r"LDGSTS",
    "mbarriers": r"SYNCS",
    "cluster_barriers": r"UCGABAR_(?:ARV|WAIT)",
}
_KERNEL = re.compile(r"(decode_[a-z]+)_kernel.*?(Brain16|Half)E(?:Li(\d+)E)?")


@dataclass(frozen=True)
class Report:
    """One kernel for one target; ``shared`` is what it has besides what a launch asks for."""

    kernel: str
    dtype: str
    rows: int
    target: str
    registers: int
    shared: int
    spills: int
    counts: dict[str, int]


def missing() -> str | None:
    """Why nothing can be compiled here, or ``None``."""
    if not SOURCES.is_dir():
        return "the CUDA sources are not there (a checkout has them)"
    return None if shutil.which("nvcc") else "nvcc was not found"


def inspect(target: str) -> Iterator[Report]:
    """Compiles every ``.cu`` for ``target`` (``80``, ``90a``); an empty kernel of another target is left out.

    Raises:
        subprocess.CalledProcessError: a source does not compile; a warning is an error.
    """
    for source in sorted(SOURCES.glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            architecture = f"-gencode=arch=compute_{target},code=sm_{target}"
            _run("nvcc", *FLAGS, architecture, "-cubin", "-o", str(cubin), str(source))
            usage = _run(_tool("cuobjdump"), "--dump-resource-usage", str(cubin))
            sass = _run(_tool("nvdisasm"), str(cubin))
        yield from _reports(target, usage, sass)


def print_table(targets: list[int] | None, as_json: bool) -> None:
    """What ``lora-kernels inspect`` says of the CUDA kernels; with one line where they cannot be compiled."""
    if reason := missing():
        if not as_json:
            print(f"inspect: the kernels of csrc/cuda cannot be compiled: {reason}")
        return
    if not as_json:
        print("  ".join(f"{name:>14}" for name in (*COLUMNS, *INSTRUCTIONS)))
    for target in TARGETS if not targets else ["90a" if t == 90 else str(t) for t in targets]:
        for report in inspect(target):
            row = dataclasses.asdict(report)
            row.update(row.pop("counts"))
            print(
                json.dumps(row) if as_json else "  ".join(f"{value!s:>14}" for value in row.values()),
                flush=True,
            )


def _reports(target: str, usage: str, sass: str) -> Iterator[Report]:
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S))
    for name, line in re.findall(r"Function (\S+):\n\s*(.*)", usage):
        body = bodies[name]
        if not re.search(r"\b(?:LDG|LD|STG|ST)\.", body):  # compiled for this target to nothing
            continue
        kernel, dtype, rows = _KERNEL.search(name).groups()
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        yield Report(
            kernel=kernel,
            dtype="bf16" if dtype == "Brain16" else "fp16",
            rows=int(rows or 16),
            target=f"sm_{target}",
            registers=number["REG"],
            shared=number["SHARED"],
            spills=number["STACK"] + number["LOCAL"],
            counts={key: len(re.findall(rf"\b{what}", body)) for key, what in INSTRUCTIONS.items()},
        )


def _tool(name: str) -> str:
    """The CUDA toolkit's own, else Triton's."""
    found = shutil.which(name)
    if found:
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
