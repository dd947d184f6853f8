"""``lora-kernels tune``: measures the strategies on the user's card and shapes, and keeps the fastest."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from .. import planner
from .._messages import progress
from ..planner import Problem

_SHAPES = ("16x4096x4096", "2048x4096x4096", "8192x4096x4096")
_OPS = ("lora_linear", "lora_linear_backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--shape", action="append", help=f"MxKxN, repeatable ({' '.join(_SHAPES)})")
    parser.add_argument("--model", help="config.json of a Transformers model: its projections at --rows")
    parser.add_argument("--rows", type=int, action="append", help="tokens for --model (2048 and 8192)")
    parser.add_argument("--rank", type=int, action="append", help="repeatable (16)")
    parser.add_argument(
        "--dtype", action="append", choices=("bf16", "fp16", "fp32"), help="repeatable (bf16)"
    )
    parser.add_argument("--dropout", type=float, action="append", help="repeatable (0 and 0.1)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of the timing")
    parser.add_argument(
        "--cpu", action="store_true", help="which way each op goes on this processor, in float32"
    )
    parser.add_argument("--predict", choices=("sm_80", "sm_90"), help="write what byte counts say; no card")
    parser.add_argument("--output", help="file to write (the folder LORA_KERNELS_PLANS, by the card's name)")


def parse_shape(text: str) -> tuple[int, int, int]:
    """(M, K, N) of ``MxKxN``.

    Raises:
        ValueError: it is not three positive numbers.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--shape: expected MxKxN as in 8192x4096x4096, got {text!r}")
    rows, cols, out = map(int, parts)
    return rows, cols, out


def model_shapes(path: str, rows: list[int]) -> list[tuple[int, int, int]]:
    """(M, K, N) of the projections of a Transformers decoder or encoder, from its config.

    Raises:
        ValueError: the file is not such a config.
    """
    try:
        config = json.loads(Path(path).read_text())
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        inner = int(config["intermediate_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--model: {path} is not a model's config.json ({error})") from error
    head = int(config.get("head_dim") or hidden // heads)
    wide, narrow = heads * head, int(config.get("num_key_value_heads") or heads) * head
    pairs = ((hidden, wide), (hidden, narrow), (wide, hidden), (hidden, inner), (inner, hidden))
    return [(m, *pair) for m in rows for pair in dict.fromkeys(pairs)]


def problems(args: argparse.Namespace, card: str) -> list[Problem]:
    """What to measure: every shape, rank, dtype and dropout, in both directions."""
    shapes = [parse_shape(text) for text in args.shape or ()]
    shapes += model_shapes(args.model, args.rows or [2048, 8192]) if args.model else []
    shapes = shapes or [parse_shape(text) for text in _SHAPES]
    ranks, dtypes, dropouts = args.rank or [16], args.dtype or ["bf16"], args.dropout or [0.0, 0.1]
    every = itertools.product(_OPS, shapes, ranks, dtypes, dict.fromkeys(p > 0 for p in dropouts))
    return [Problem(op, *shape, rank, dtype, card, dropped) for op, shape, rank, dtype, dropped in every]


def run(args: argparse.Namespace) -> int:
    """Measures and writes; 2 where there is no card to measure or an option is wrong."""
    import torch

    from .. import _backend

    if args.predict:
        return _predict(args)
    if args.cpu:
        from ..testing.timers import HostTimer

        return tune_cpu(args, HostTimer())
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device here, and times in an interpreter say nothing about a card;")
        print("      --cpu measures which way each op goes on this processor")
        return 2
    if reason := _backend.triton_missing():
        print(f"tune: the strategies are Triton kernels, and {reason}")
        return 2
    from ..testing.timers import CudaTimer

    device = torch.device("cuda", torch.cuda.current_device())
    return tune(args, device, planner.card(device), CudaTimer())


def tune(args: argparse.Namespace, device: Any, card: str, timer: Any) -> int:
    """The command on one device with one timer; the tests inject both."""
    from .. import tuning

    try:
        wanted = problems(args, card)
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    measured = []
    with progress("tune", len(wanted)) as tick:
        for problem in wanted:
            measured.append(tuning.measure(problem, device, timer, args.repeats))
            tick()
    path = Path(args.output) if args.output else planner.user_table(card)
    tuning.save(path, card, [result.entry for result in measured if result.entry is not None])
    for result in measured:
        _report(result)
    print(f"table: {path}")
    return 0 if any(result.entry for result in measured) else 1


def tune_cpu(args: argparse.Namespace, timer: Any) -> int:
    """The command for the processor: each way of each op, for one shape of each class or for those given."""
    from .. import _cpu_ways, _extension, tuning, tuning_cpu

    if reason := _extension.load():
        print(f"tune: {reason}")
        return 2
    try:
        given = [parse_shape(text) for text in args.shape or ()]
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    shapes = [(*shape, rank) for shape in given for rank in args.rank or [16]]
    todo = list(itertools.product(tuning_cpu.ops(), shapes or map(_cpu_ways.example, _cpu_ways.CLASSES)))
    measured = []
    with progress("tune", len(todo)) as tick:
        for op, shape in todo:
            measured.append(tuning_cpu.measure(op, shape, timer, args.repeats))
            tick()
    times = tuning_cpu.merge(measured)
    path = Path(args.output) if args.output else _cpu_ways.table()
    tuning.save_ways(path, times)
    _report_ways(times)
    used = "used from now on" if path == _cpu_ways.table() else "used where it is the one of the environment"
    print(f"table: {path}, {used}")
    return 0


def _report_ways(times: Any) -> None:
    """The fastest way of each op and class, with the times of all of them over its own."""
    for op, classes in times.items():
        for name, ways in classes.items():
            best = min(ways, key=ways.__getitem__)
            rest = ", ".join(f"{way} {us / ways[best]:.2f} x" for way, us in ways.items() if way != best)
            print(f"{op:<27} {name:<20} {best}, {ways[best]:.0f} us ({rest})")


def _predict(args: argparse.Namespace) -> int:
    """The tables that ship: made here, until someone measures better ones."""
    from .. import tuning

    if not args.output:
        print("tune: --predict wants an --output, so that no table of measurements is written over")
        return 2
    table = tuning.predict(problems(args, args.predict), args.predict)
    made = "predicted from byte counts and assumed rates, nothing measured: lora_kernels/kernels/traffic.py"
    tuning.write(Path(args.output), planner.to_text(table, made))
    return 0


def _report(result: Any) -> None:
    p = result.problem
    direction = "backward" if p.op.endswith("backward") else "forward"
    label = f"{direction:>8} {p.rows}x{p.cols}x{p.out} r={p.rank} {p.dtype}{' dropout' if p.dropout else ''}"
    for plan, reason in result.failed:
        print(f"{label}: {_name(plan)} left out: {reason}")
    if result.entry is None:
        print(f"{label}: nothing could be measured")
        return
    times = {_name(plan): us for plan, us in result.entry.times}
    best = _name(result.entry.best())
    against = (
        f", {times['beta'] / times[best]:.2f} x as fast as beta" if best != "beta" and "beta" in times else ""
    )
    print(f"{label}: {best}, {times[best]:.1f} us{against}")


def _name(plan: planner.Plan) -> str:
    changes = " ".join(f"{part}.{k}={v}" for part, tile in plan.tile.items() for k, v in tile.items())
    return f"{plan.strategy} {changes}".strip()
