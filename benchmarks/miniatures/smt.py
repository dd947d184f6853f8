"""SMT: gradients of a warm-up find the blocks that a teacher changed."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import calibrate
from lora_kernels.nn import LoRALinear
from lora_kernels.stats import select_blocks

from ._fit import fit

CLAIM = "gradients find both blocks that changed; 1 % of the loss is left, by LoRA of as many numbers a tenth"
WIDTH, BLOCK, STEPS = 64, 16, 150
CHANGED = [(0, 2), (3, 1)]


def run(seed: int) -> dict[str, float]:
    """The share of the blocks found, and the loss left, by method."""
    torch.manual_seed(seed)
    x, base = torch.randn(512, WIDTH), torch.nn.Linear(WIDTH, WIDTH, bias=False)
    change = torch.zeros(WIDTH, WIDTH)
    for i, j in CHANGED:
        change[BLOCK * i : BLOCK * (i + 1), BLOCK * j : BLOCK * (j + 1)] = torch.randn(BLOCK, BLOCK) / 4
    want = (x @ (base.weight + change).T).detach()
    model = torch.nn.Sequential(base)
    gradients = calibrate(
        model, [x], ("gradient",), forward=lambda m, batch: (m(batch) - want).square().mean()
    )
    blocks = select_blocks(gradients, len(CHANGED), BLOCK, score="l2")["0"]
    options = {"block": BLOCK, "blocks": blocks}
    smt = LoRALinear.from_linear(_copy(base), method="smt", method_options=options)
    lora = LoRALinear.from_linear(_copy(base), r=4, lora_alpha=4)
    found = {"found": len({*blocks} & {*CHANGED}) / len(CHANGED)}
    for name, layer in (("SMT", smt), ("LoRA", lora)):

        def loss(layer: LoRALinear = layer) -> Tensor:
            return (layer(x) - want).square().mean()

        found[name] = fit(loss, [p for p in layer.parameters() if p.requires_grad], STEPS, 2e-2)
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """Over all seeds."""
    return all(one["found"] == 1 and one["SMT"] < 0.01 and one["LoRA"] > 0.1 for one in figures)


def _copy(linear: torch.nn.Linear) -> torch.nn.Linear:
    other = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    other.load_state_dict(linear.state_dict())
    return other
