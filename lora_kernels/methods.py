"""The register of methods: one line each, from which the command line, the docs and the tests are made.

To add one, write its file and a line here. It imports nothing of the package.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Method(NamedTuple):
    """One method of the literature."""

    # Its name in configs and on the command line.
    key: str
    # What it is, in a line.
    title: str
    # Of its paper.
    arxiv: str
    # Its rows in the literature list.
    rows: tuple[int, ...]
    # structure: a LoRAConfig's method. start, step, company, knowledge, layer: see CONTRIBUTING.
    kind: str
    # The module, below the package.
    home: str
    # Whether it was checked against an oracle that is not our own code, and its spec against the paper's.
    verified: bool = True

    @property
    def file(self) -> str:
        """Where it is, from the root of the repository."""
        return f"lora_kernels/{self.home.replace('.', '/')}.py"


KINDS = ("structure", "start", "step", "company", "knowledge", "layer")
REGISTER = (
    Method(
        "lora", "LoRA; rsLoRA with `use_rslora=True`", "2106.09685", (1, 87), "structure", "adapters.lora"
    ),
    Method("lora_fa", "LoRA-FA: A frozen, x not saved", "2308.03303", (82,), "structure", "adapters.lora_fa"),
    Method(
        "lora_xs",
        "LoRA-XS: an r×r core between SVD factors",
        "2405.17604",
        (4,),
        "structure",
        "adapters.lora_xs",
    ),
    Method(
        "sora",
        "SoRA: a gate on the rank, with a proximal step",
        "2311.11696",
        (84,),
        "structure",
        "adapters.sora",
    ),
    Method(
        "dylora",
        "DyLoRA: any rank ≤ r at run time, as a view",
        "2210.07558",
        (76,),
        "structure",
        "adapters.dylora",
    ),
    Method(
        "dora",
        "DoRA (`use_dora=True`): W + (α/r)BA, rows of trained length",
        "2402.09353",
        (),
        "structure",
        "adapters.dora",
    ),
)


@functools.cache
def structures() -> dict[str, Method]:
    """Key -> the line of each structure, which a :class:`LoRAConfig` names."""
    return {one.key: one for one in REGISTER if one.kind == "structure"}


def listing() -> str:
    """The register as ``docs/methods.md`` has it."""
    lines = [
        "# Methods",
        "",
        "Made by `lora-kernels methods --write` from `lora_kernels/methods.py`.",
        "",
        "| key | what it is | kind | paper | rows | file | verified |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in REGISTER:
        rows = ", ".join(f"{row:02}" for row in one.rows) or "–"
        state = "yes" if one.verified else "no"
        cells = (f"`{one.key}`", one.title, one.kind, _paper(one), rows, f"`{one.file}`", state)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table() -> str:
    """The structures as the README has them."""
    lines = ["| `method` | what it is | paper |", "|---|---|---|"]
    lines += [f"| `{one.key}` | {one.title} | {_paper(one)} |" for one in structures().values()]
    return "\n".join(lines) + "\n"


def _paper(one: Method) -> str:
    return f"[{one.arxiv}](https://arxiv.org/abs/{one.arxiv})" if one.arxiv else "–"
