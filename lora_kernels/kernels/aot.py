"""Compiles every kernel ahead of time, with no card, and reads what the assembler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .config import GemmTile, stages
from .specs import Spec

# What a thread block may have of shared memory, in bytes, on each target.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TARGETS = tuple(SHARED_LIMIT)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What the assembler made of a :class:`Spec` for one target."""

    kernel: str
    variant: str
    dtype: str
    rank: int
    target: str
    warps: int
    registers: int
    shared: int
    spills: int
    mma: str
    copies: int
    wide_loads: int
    narrow_loads: int


# Rows along which the kernels read have unit stride; the launcher sees to it.
_UNIT = ("stride_ak", "stride_br", "stride_wk", "strides_ak", "strides_br")
_FLOATS = ("scaling", "keep_scale", "scale", "scalings", "keep_scales")
# Tuples with one item a member.
_EACH = ("outs", "ranks", "strides_", "scalings", "keep_scales", "thresholds")
_UNSPECIALISED = (
    "M",
    "parts",
    "rows",
    "threshold",
    "thresholds",
    "rows_per_chunk",
    "slots",
    "adapters",
    "per_row",
    "splits",
    "segments",
    "slices",
    "given",
    "tiles",
    "row_step",
)


def _source(spec: Spec) -> ASTSource:
    """The kernel as the launcher would specialise it for sizes that are multiples of 16."""
    constants = dict(spec.constants)
    if spec.tile is not None:
        tile = spec.tile
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c, "BLOCK_R": tile.block_r}
        if isinstance(tile, GemmTile):
            constants |= {"BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}
    constants = {name: value for name, value in constants.items() if name in spec.fn.arg_names}
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for i, (name, parameter) in enumerate(zip(spec.fn.arg_names, spec.fn.params, strict=True)):
        if parameter.has_default and name not in spec.pointers:
            constants.setdefault(name, parameter.default)
        if "MEMBERS" in constants and (name.endswith("_ptrs") or name.startswith(_EACH)):
            signature[name] = _each(spec, i, name, constants, attrs)
            continue
        if name in _UNIT and not ("stride_wn" in constants and name == "stride_wk"):
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
        elif name in _FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = spec.pointers.get(name, "*fp32") if name.endswith("_ptr") else "i32"
            if name not in _UNSPECIALISED and not signature[name].startswith("tensordesc"):
                attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(spec.fn, signature, constexprs=constants, attrs=attrs)


def _each(
    spec: Spec, i: int, name: str, constants: dict[Any, Any], attrs: dict[tuple[int, ...], Any]
) -> tuple[str, ...]:
    """The types of a tuple that has one item a member."""
    paths = [(i, j) for j in range(constants["MEMBERS"])]
    if name in _UNIT:
        constants.update(dict.fromkeys(paths, 1))
        return ("constexpr",) * len(paths)
    if name in _FLOATS:
        return ("fp32",) * len(paths)
    if name not in _UNSPECIALISED:
        attrs.update({path: [["tt.divisibility", 16]] for path in paths})
    return (spec.pointers.get(name, "i32"),) * len(paths)


def inspect(spec: Spec, target: str) -> Report:
    """Compiles ``spec`` for one of ``TARGETS`` and reads the machine code."""
    spec = spec.at(target)
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    options = {}
    if spec.tile is not None:
        options = {"num_warps": spec.tile.num_warps, "num_stages": stages(spec.tile, amd)}
    compiled = triton.compile(_source(spec), target=gpu, options=options)
    facts = _read_amd(compiled.asm["amdgcn"]) if amd else _read_nvidia(compiled.asm["cubin"])
    names = {name: getattr(spec, name) for name in ("kernel", "variant", "dtype", "rank")}
    shape = {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared}
    return Report(**names, target=target, **shape, **facts)


def _read_nvidia(cubin: bytes) -> dict[str, Any]:
    usage, sass = _disassemble(cubin)
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E\S*", sass)
    wide = sum(".128" in load for load in loads)
    copies = len(re.findall(r"\bUTMALDG", sass))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "mma": _mma_kind(sass),
        "copies": copies,
        "wide_loads": wide + copies,
        "narrow_loads": len(loads) - wide,
    }


def _read_amd(assembly: str) -> dict[str, Any]:
    """From the metadata that ends the assembly; a scalar register spills into a vector's lane, not memory."""
    loads = re.findall(r"\b(?:global|buffer)_load_\S+", assembly)
    wide = sum("dwordx4" in load for load in loads)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1]),
        "mma": "MFMA" if "v_mfma" in assembly else "-",
        "copies": 0,
        "wide_loads": wide,
        "narrow_loads": len(loads) - wide,
    }


def _mma_kind(sass: str) -> str:
    for kind in ("UTCHMMA", "UTCQMMA", "HGMMA", "HMMA"):
        if re.search(rf"\b{kind}\b", sass):
            return kind
    return "-"


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The assembler's resource report and the machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", file.name)


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_TOOLS / name, *args], check=True, capture_output=True, text=True).stdout
