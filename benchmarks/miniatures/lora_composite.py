"""LoRA Composite: two adapters' denoisers averaged, beside the model with both merged."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.compose import composite_forward
from lora_kernels.nn import set_adapter, train_adapters

CLAIM = "the mean of two adapters' guidance stays nearer to both than the model with both added up"


class Net(nn.Module):
    """A small denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def run(seed: int) -> dict[str, float]:
    """Mean distance to the two concepts' outputs, of the composite and of the sum."""
    torch.manual_seed(seed)
    model, x = Net(), torch.randn(256, 8)
    specs = {name: LoRAConfig(r=4, target_modules=["up", "down"]) for name in "ab"}
    trained = train_adapters(model, specs)
    targets = {name: x @ torch.randn(8, 8) / 8**0.5 for name in "ab"}
    for name in "ab":
        set_adapter(model, name)
        optimizer = torch.optim.Adam(trained[name], lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            (model(x) - targets[name]).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        composite = composite_forward(model, ["a", "b"], x)
        set_adapter(model, ["a", "b"])
        merged = model(x)
    return {name: _far(y, targets) for name, y in (("composite", composite), ("merged", merged))}


def holds(figures: list[dict[str, float]]) -> bool:
    """Nearer in every seed."""
    return all(one["composite"] < one["merged"] for one in figures)


def _far(y, targets):
    return float(sum((y - target).square().mean().sqrt() for target in targets.values()) / len(targets))
