"""The summary: a table on the terminal and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path

from .serve import Served
from .sizes import DRAWS, Cost, Sizes, left_out
from .train import Outcome, quantiles


def print_table(outcomes: list[Outcome]) -> None:
    """One row a label set."""
    from rich.console import Console
    from rich.table import Table

    columns = (
        "label set",
        "classes",
        "train",
        "held out",
        "frozen",
        "LoRA",
        "margin",
        "spread",
        "s",
        "reload diff",
    )
    table = Table(*columns, title="Held-out accuracy (%), its range over draws: frozen features against LoRA")
    for o in outcomes:
        cells = (o.task, o.classes, o.train, o.test, _range(o.frozen), _range(o.lora))
        points = (f"{100 * o.margin:+.1f}", f"{100 * o.spread:.1f}", f"{o.seconds:.0f}")
        table.add_row(*map(str, cells), *points, f"{o.reload_difference:.1e}")
    Console(width=110).print(table)


def _range(scores: list[float]) -> str:
    """The mean, and in brackets the least and the largest where there are several."""
    mean = f"{100 * statistics.mean(scores):.1f}"
    return f"{mean} ({100 * min(scores):.1f} to {100 * max(scores):.1f})" if len(scores) > 1 else mean


def print_sizes(sizes: Sizes, cost: Cost, seconds: float) -> None:
    """What was chosen, and why."""
    texts = f"{sizes.train} training texts, {sizes.epochs} pass{'es' if sizes.epochs > 1 else ''}"
    sets = f"{sizes.label_sets} label set{'s' if sizes.label_sets > 1 else ''}"
    runs = f"{sets} of {texts}, {sizes.held_out} held out"
    print(f"a text takes {1e3 * cost.step:.1f} ms to train on and {1e3 * cost.forward:.1f} ms to read,")
    print(f"so in the {seconds:.0f} s left: {runs}, {sizes.seeds} of {DRAWS} draws with LoRA")
    if less := left_out(sizes):
        print(f"less than the whole job: {', '.join(less)}")
    print(f"expected: {sizes.seconds(cost):.0f} s", flush=True)


def print_served(served: list[Served]) -> None:
    """One row an adapter of the mixed batch, and one for the base."""
    from rich.console import Console
    from rich.table import Table

    columns = ("adapter", "rows", "max difference", "from the base")
    table = Table(*columns, title="One mixed batch: each row against its adapter alone")
    for s in served:
        table.add_row(s.adapter, str(s.rows), f"{s.difference:.1e}", f"{s.from_base:.1e}")
    Console(width=110).print(table)


def print_times(times: dict[str, list[float]]) -> None:
    """Milliseconds a training step, and the ratio of the medians."""
    medians = {}
    for name in ("PEFT", "lora-kernels"):
        medians[name], low, high = quantiles(times[name])
        print(f"step of the encoder, {name:<13} {medians[name]:7.1f} ms  (p20 {low:.1f}, p80 {high:.1f})")
    print(f"lora-kernels / PEFT = {medians['lora-kernels'] / medians['PEFT']:.3f}")


def plot(outcomes: list[Outcome], times: dict[str, list[float]], path: Path) -> None:
    """Accuracies, losses and step times in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    _accuracies(left, outcomes)
    for o in outcomes:
        smooth = [sum(o.losses[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(o.losses))]
        middle.plot(smooth, label=o.task)
    middle.set(title="Training loss (mean of 10 steps)", xlabel="step")
    middle.legend(frameon=False)
    medians = {name: quantiles(values) for name, values in times.items() if name != "forward"}
    errors = [[m - low for m, low, _ in medians.values()], [high - m for m, _, high in medians.values()]]
    right.bar(
        list(medians),
        [m for m, _, _ in medians.values()],
        yerr=errors,
        capsize=6,
        color=["#b8b8b8", "#2b6cb0"],
    )
    right.set(title="Training step of the encoder (ms, p20 to p80)")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _accuracies(axes, outcomes: list[Outcome]) -> None:
    places = range(len(outcomes))
    for shift, label, color in ((-0.2, "frozen", "#b8b8b8"), (0.2, "LoRA", "#2b6cb0")):
        values = [100 * statistics.mean(getattr(o, label.lower())) for o in outcomes]
        bars = axes.bar([p + shift for p in places], values, 0.38, label=label, color=color)
        axes.bar_label(bars, fmt="%.1f")
    axes.set(title="Held-out accuracy (%)", ylim=(0, 109))
    axes.set_xticks(list(places), [o.task for o in outcomes])
    axes.legend(frameon=False, ncols=2, loc="upper right")
