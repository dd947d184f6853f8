"""Matrix-transformation LoRA: four forms of the core, at r² or 2r² numbers."""

from __future__ import annotations

from lora_kernels.nn import LoRALinear

from ._change import left_of_change, random_change

CLAIM = (
    "each of the four cores fits a change of rank 4 with r = 8 to 2 %, for 64 or 128 numbers beside A and B"
)
WIDTH, RANK, R, STEPS = 32, 4, 8, 300  # with r = 4 a core that turns singular on the way stays so


def run(seed: int) -> dict[str, float]:
    """What is left of the change, by structure."""
    x, change = random_change(seed, WIDTH, RANK)
    found = {}
    for structure in ("shim", "icfm", "ctcm", "dtsm"):
        options = {"method": "mt_lora", "method_options": {"structure": structure}}
        layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, **options)
        found[structure] = left_of_change(layer, x, change, STEPS)
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """All four, in every seed."""
    return all(left < 0.02 for one in figures for left in one.values())
