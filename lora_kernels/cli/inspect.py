"""``lora-kernels inspect``: what the assembler made of every kernel, with no card needed."""

from __future__ import annotations

import argparse
import dataclasses
import json

COLUMNS = (
    "kernel",
    "variant",
    "dtype",
    "rank",
    "target",
    "registers",
    "shared",
    "spills",
    "mma",
    "copies",
    "wide_loads",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--target", action="append", help="sm_80 or 80, sm_90, sm_100, gfx942 (all)")
    parser.add_argument("--rank", type=int, action="append", help="rank bucket (16, 64, 128, 256, 512)")
    parser.add_argument("--dtype", action="append", choices=("bf16", "fp16", "fp32"), help="default bf16")
    parser.add_argument("--json", action="store_true", help="print JSON lines, one a kernel")


def run(args: argparse.Namespace) -> int:
    """Compiles and prints; returns 1 where Triton is missing or interpreting."""
    from .. import _backend

    reason = "TRITON_INTERPRET is set" if _backend.interpreting() else _backend.triton_missing()
    if reason is not None:
        print(f"inspect: the kernels cannot be compiled: {reason}")
        return 1
    from ..kernels import aot, cuda_static

    targets = [f"sm_{name}" if name.isdigit() else name for name in args.target or aot.TARGETS]
    if unknown := set(targets) - set(aot.TARGETS):
        print(f"inspect: --target: expected one of {', '.join(aot.TARGETS)}, got {', '.join(unknown)}")
        return 2
    if not args.json:
        print("  ".join(f"{name:>10}" for name in COLUMNS))
    for spec in aot.specs(tuple(args.dtype or ("bf16",)), tuple(args.rank or aot.RANKS)):
        for target in targets:
            row = dataclasses.asdict(aot.inspect(spec, target))
            if args.json:
                print(json.dumps(row), flush=True)
            else:
                print("  ".join(f"{row[name]!s:>10}" for name in COLUMNS), flush=True)
    if not args.rank and not args.dtype:  # the CUDA kernels have neither
        cuda_static.print_table(args.target, args.json)
    return 0
