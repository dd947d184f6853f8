"""NeFT: neurons that a short training turns are those that the task needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_kernels.nn import LoRALinear
from lora_kernels.stats import select_neurons

from ._fit import fit

CLAIM = "finds the 5 % of rows that changed by a short full training, and fits the change to 1 % with them"
WIDTH, HIDDEN, STEPS = 32, 80, 150


def run(seed: int) -> dict[str, float]:
    """The share of the rows found, and the loss left with those alone."""
    torch.manual_seed(seed)
    x, base = torch.randn(512, WIDTH), nn.Linear(WIDTH, HIDDEN, bias=False)
    changed = torch.randperm(HIDDEN)[: HIDDEN // 20].tolist()
    teacher = base.weight.detach().clone()
    teacher[changed] += 0.3 * torch.randn(len(changed), WIDTH)
    want = x @ teacher.T
    full = nn.Linear(WIDTH, HIDDEN, bias=False)
    full.load_state_dict(base.state_dict())
    fit(lambda: (full(x) - want).square().mean(), full.parameters(), 20, 1e-2)
    before, after = {"up_proj": base.weight.detach()}, {"up_proj": full.weight.detach()}
    rows = select_neurons(before, after, 0.05)["rows"]["up_proj"]
    layer = LoRALinear.from_linear(base, method="neft", method_options={"rows": rows})

    def loss() -> Tensor:
        return (layer(x) - want).square().mean()

    left = fit(loss, [p for p in layer.parameters() if p.requires_grad], STEPS, 2e-2)
    return {"found": len({*rows} & {*changed}) / len(changed), "left": left}


def holds(figures: list[dict[str, float]]) -> bool:
    """Over all seeds."""
    return all(one["found"] == 1 and one["left"] < 0.01 for one in figures)
