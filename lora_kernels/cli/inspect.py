"""``lora-kernels inspect``: what the assembler made of every kernel, with no card needed."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from typing import Any

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
    parser.add_argument("--kernel", action="append", help="only the kernels of these names (all)")
    parser.add_argument("--once", action="store_true", help="of each kernel the heaviest variant alone")
    parser.add_argument("--bytes", action="store_true", help="what each launch moves, and the floor of it")
    parser.add_argument("--shape", action="append", help="MxKxN for --bytes (8192x4096x4096)")
    parser.add_argument("--json", action="store_true", help="print JSON lines, one a kernel")


def run(args: argparse.Namespace) -> int:
    """Compiles, or counts, and prints; returns 1 where Triton is missing or only interprets."""
    from .. import _backend

    reason = _backend.triton_missing()
    if reason is None and not args.bytes and _backend.interpreting():
        reason = "TRITON_INTERPRET is set"
    if reason is not None:
        print(f"inspect: the kernels cannot be compiled: {reason}")
        return 1
    return _bytes(args) if args.bytes else _compile(args)


def _compile(args: argparse.Namespace) -> int:
    from ..kernels import aot, cuda_static
    from ..kernels import specs as known

    targets = [f"sm_{name}" if name.isdigit() else name for name in args.target or aot.TARGETS]
    if unknown := set(targets) - set(aot.TARGETS):
        print(f"inspect: --target: expected one of {', '.join(aot.TARGETS)}, got {', '.join(unknown)}")
        return 2
    specs = list(known.specs(tuple(args.dtype or ("bf16",)), tuple(args.rank or known.RANKS), args.once))
    if unknown := set(args.kernel or ()) - (names := {spec.kernel for spec in specs}):
        print(f"inspect: --kernel: expected one of {', '.join(sorted(names))}, got {', '.join(unknown)}")
        return 2
    if not args.json:
        print("  ".join(f"{name:>10}" for name in COLUMNS))
    for spec in (one for one in specs if not args.kernel or one.kernel in args.kernel):
        for target in targets:
            row = dataclasses.asdict(aot.inspect(spec, target))
            if args.json:
                print(json.dumps(row), flush=True)
            else:
                print("  ".join(f"{row[name]!s:>10}" for name in COLUMNS), flush=True)
    if not args.rank and not args.dtype and not args.kernel:  # the CUDA kernels have neither
        cuda_static.print_table(args.target, args.json)
    return 0


def _bytes(args: argparse.Namespace) -> int:
    """Prints the byte counts of every strategy, both directions, and of QuanTA's chain of gates."""
    from ..adapters.structured.quanta import balanced
    from ..kernels import traffic
    from ..planner import STRATEGIES, Plan, Problem
    from .tune import parse_shape

    try:
        shapes = {text: parse_shape(text) for text in args.shape or ["8192x4096x4096"]}
    except ValueError as error:
        print(f"inspect: {error}")
        return 2
    if not args.json:
        print("           shape  rank        op  strategy       launch        MB  floor  asked")
    for shape, rank in itertools.product(shapes, args.rank or [16]):
        for op, strategy in itertools.product(("lora_linear", "lora_linear_backward"), STRATEGIES[1:]):
            if op.endswith("backward") and strategy == "single":  # it is beta's
                continue
            dtype = (args.dtype or ["bf16"])[0]
            problem = Problem(op, *shapes[shape], rank, dtype, "sm_90", dropout=True)
            for launch in traffic.launches(problem, Plan(strategy)):
                _print_bytes(args.json, shape, rank, op, strategy, launch)
    for shape, sizes in shapes.items():
        rows, cols, out = sizes
        for launch in traffic.gate_chain(rows, cols, out, balanced(cols), (args.dtype or ["bf16"])[0]):
            op = "gate_chain" if launch.name.endswith(" y") else "gate_chain_backward"
            _print_bytes(args.json, shape, 0, op, "chain", launch)
    return 0


def _print_bytes(as_json: bool, shape: str, rank: int, op: str, strategy: str, launch: Any) -> None:
    direction = "backward" if op.endswith("backward") else "forward"
    if as_json:
        head = {"shape": shape, "rank": rank, "op": direction, "strategy": strategy}
        print(json.dumps(head | dataclasses.asdict(launch)))
        return
    asked = launch.requested / launch.floor
    print(
        f"{shape:>16} {rank:>5} {direction:>9} {strategy:>9} {launch.name:>12}"
        f" {launch.memory / 1e6:>9.1f} {launch.ratio:>6.3f} {asked:>6.2f}"
    )
