"""LoRAMoE: a localised loss parts two kinds of samples between two halves of the experts."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear, side_inputs
from lora_kernels.routing import localized_balance_loss

from ._fit import fit
from ._tasks import copy_of, tasks

CLAIM = "the loss takes the weight on the half of a sample's kind to 0.35 ± 0.1; without it varies"
EXPERTS, STEPS = 4, 150


def run(seed: int) -> dict[str, float]:
    """The weight that a sample gives to the experts of its own kind."""
    toy = tasks(seed, 2)
    figures = {}
    for name, share in (("without", 0.0), ("with", 0.3)):
        torch.manual_seed(seed)
        options = {"method": "loramoe", "method_options": {"experts": EXPERTS}}
        layer = LoRALinear.from_linear(copy_of(toy.linear), r=2, lora_alpha=2, **options)

        def loss(layer: LoRALinear = layer, share: float = share) -> torch.Tensor:
            with side_inputs(layer) as call:
                y = layer(toy.x)
            return (y - toy.want).square().mean() + share * localized_balance_loss(call, toy.task, 0.3)

        fit(loss, layer.adapters.parameters(), STEPS, 2e-2)
        with torch.no_grad():
            weights = (toy.x @ layer.adapters["default"].router.T).softmax(-1).mean(1)
            first = weights[:, : EXPERTS // 2].sum(1)
            figures[name] = float(torch.where(toy.task == 1, first, 1 - first).mean())
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(abs(one["with"] - 0.35) < 0.1 for one in figures) and any(
        abs(one["without"] - 0.35) > 0.1 for one in figures
    )
