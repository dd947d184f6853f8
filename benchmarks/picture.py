"""The README's picture, drawn from a committed table: ``python -m benchmarks.picture``.

It is drawn twice, on nothing, for light pages and for dark ones. Each file carries the digest of what it
shows, so that a test sees where a table has gone on without it.
"""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "cpu.csv"
CASE = {"op": "lora_linear", "mode": "both", "shape": "512x2048x2048", "dtype": "float32", "rank": "16"}
DROPOUTS = {"0": "no dropout", "0.1": "dropout 0.1"}
PROVIDERS = {
    "peft": "PEFT",
    "eager": "eager PyTorch",
    "ours_in_peft": "PEFT after accelerate",
    "ours_module": "LoRALinear",
}


@dataclass(frozen=True)
class Theme:
    """Colours: of text and lines, of our bars, of the others'."""

    text: str
    ours: str
    others: str


THEMES = {"light": Theme("#1f2328", "#1a7f37", "#8c959f"), "dark": Theme("#e6edf3", "#3fb950", "#6e7681")}


def figures(table: Path = TABLE) -> dict[str, Any]:
    """What the picture shows: each provider's ratio to a frozen linear by dropout, and the conditions."""
    with table.open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if CASE.items() <= row.items()]
    ratios = {(row["dropout"], row["provider"]): float(row["ratio_frozen"]) for row in rows}
    return {
        "under": f"{rows[0]['device']}, torch {rows[0]['torch']}, PEFT {rows[0]['peft']}",
        "ratios": [[ratios[dropout, provider] for provider in PROVIDERS] for dropout in DROPOUTS],
    }


def digest(table: Path = TABLE) -> str:
    """Of all that the picture shows."""
    return hashlib.sha256(json.dumps(figures(table)).encode()).hexdigest()


def _panel(axes: Any, title: str, ratios: list[float], theme: Theme) -> None:
    colors = [theme.ours if name.startswith("ours") else theme.others for name in PROVIDERS]
    bars = axes.barh(list(PROVIDERS.values()), ratios, color=colors, height=0.7)
    axes.bar_label(bars, fmt="%.2f", padding=4, color=theme.text, fontsize=10)
    axes.axvline(1, color=theme.text, linewidth=0.8, linestyle=":")
    axes.set_title(title, fontsize=10, color=theme.text)
    axes.set_xlim(0, 1.65)
    axes.tick_params(colors=theme.text, labelsize=10, length=0)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1 = frozen"])
    axes.spines[:].set_visible(False)


def draw(path: Path, theme: Theme, table: Path = TABLE) -> None:
    """Writes one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = figures(table)
    figure = Figure(figsize=(9, 2.6), dpi=144, layout="constrained", facecolor="none")
    panels = figure.subplots(1, len(DROPOUTS), sharey=True)
    for axes, title, ratios in zip(panels, DROPOUTS.values(), shown["ratios"], strict=True):
        axes.set_facecolor("none")
        _panel(axes, title, ratios, theme)
    figure.supxlabel(f"time / a frozen nn.Linear's; {shown['under']}", fontsize=8, color=theme.text)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Source": digest(table)})


def files(folder: Path = RESULTS) -> dict[str, Path]:
    """Where the picture of each theme lies."""
    return {name: folder / f"{TABLE.stem}-{name}.png" for name in THEMES}


if __name__ == "__main__":
    for name, path in files().items():
        draw(path, THEMES[name])
