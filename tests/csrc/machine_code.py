"""Reads the disassembly of the CPU loops: how often whole vectors go through the stack."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"^[0-9a-f]+ <(?:.*)lora_kernels::(avx512|avx2|sse2|neon)::(\w+)\((.*)\)>:$")
INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$")
JUMP = re.compile(r"^(?:j\w+|b|b\.\w+|cbn?z|tbn?z)$")
TARGET = re.compile(r"(?:^|\s)([0-9a-f]+) <")


@dataclass(frozen=True)
class Syntax:
    """How an architecture's disassembly shows a whole vector, and a fixed place on the stack.

    A place with an index is no spilled register but a buffer that the loop walks over. What works on one
    element of a vector, such as the conversion of a half, is not counted.
    """

    vectors: dict[str, re.Pattern[str]]  # by version
    scalar: re.Pattern[str]  # instructions on one element
    stack: re.Pattern[str]
    frame: re.Pattern[str]  # what is a fixed place too where the frame pointer is set up
    frame_set: re.Pattern[str]


X86 = Syntax(
    {name: re.compile(rf"%{letter}mm\d") for name, letter in (("avx512", "z"), ("avx2", "y"), ("sse2", "x"))},
    re.compile(r"^v?(\w*s[sd]|mov[dqlh]\w*|pinsr\w|pextr\w|cvt\w+)$"),
    re.compile(r"\(%rsp\)"),
    re.compile(r"\(%rbp\)"),
    re.compile(r"mov\s+%rsp,%rbp"),
)
ARM = Syntax(
    {"neon": re.compile(r"\b(?:v\d+\.\d+[bhsd]\b|q\d+\b)")},
    re.compile(r"^fcvt\w*$"),
    re.compile(r"\[sp(?:, #\d+)?\]"),
    re.compile(r"\[x29(?:, #-?\d+)?\]"),
    re.compile(r"mov\s+x29, sp"),
)


@dataclass(frozen=True)
class Loops:
    """What the innermost loops of one function do with whole vectors."""

    version: str
    name: str
    vector_instructions: int
    stack_accesses: int

    @property
    def share(self) -> float:
        return self.stack_accesses / max(1, self.vector_instructions)


def disassemble(path: Path, objdump: str = "objdump") -> str:
    command = [objdump, "-d", "-C", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(text: str) -> Iterator[tuple[str, str, list[tuple[int, str, str]]]]:
    """The version, the name with its first argument, and the code of every function of a version."""
    head, code = None, []
    for line in text.splitlines():
        if not line.strip() or line.endswith(">:"):
            if head and code:
                yield *head, code
            found = FUNCTION.match(line)
            head = (found[1], f"{found[2]}({found[3].split(',')[0]})") if found else None
            code = []
        elif head and (found := INSTRUCTION.match(line)):
            code.append((int(found[1], 16), found[2], found[3]))
    if head and code:
        yield *head, code


def innermost(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """First and last address of every loop that has no other in it."""
    loops = []
    for address, name, operands in code:
        target = TARGET.search(operands) if JUMP.match(name) else None
        if target and int(target[1], 16) <= address:
            loops.append((int(target[1], 16), address))
    loops.sort(key=lambda loop: loop[1] - loop[0])
    found: list[tuple[int, int]] = []
    for first, last in loops:
        if not any(first <= begin and end <= last for begin, end in found):
            found.append((first, last))
    return found


def loops_of(text: str, syntax: Syntax) -> list[Loops]:
    """The innermost loops of every function of a version."""
    found = []
    for version, name, code in functions(text):
        ranges = innermost(code)
        framed = any(syntax.frame_set.match(f"{op} {args}") for _, op, args in code)
        vectors = stack = 0
        for address, op, operands in code:
            if syntax.scalar.match(op) or not syntax.vectors[version].search(operands):
                continue
            if not any(first <= address <= last for first, last in ranges):
                continue
            vectors += 1
            stack += bool(syntax.stack.search(operands) or (framed and syntax.frame.search(operands)))
        found.append(Loops(version, name.replace("lora_kernels::", ""), vectors, stack))
    return found
