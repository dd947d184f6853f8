"""ShareLoRA: one A for all layers of a role costs about half the parameters."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import count_parameters

from ._change import fit, squared_error

CLAIM = (
    "with one A for six layers it trains 0.58 of LoRA's parameters, and the loss on unseen samples of what"
    " both learn through noise is within 1.25 of LoRA's"
)
WIDTH, LAYERS, R, STEPS = 24, 6, 8, 120


def run(seed: int) -> dict[str, float]:
    """Parameters over LoRA's, and the losses on unseen samples of a teacher near the base."""
    torch.manual_seed(seed)
    x, unseen, base, teacher = torch.randn(64, WIDTH), torch.randn(512, WIDTH), _net(), _net()
    with torch.no_grad():
        for ours, theirs in zip(base.parameters(), teacher.parameters(), strict=True):
            theirs.copy_(ours + 0.3 * theirs)
        want, of_unseen = teacher(x) + 0.3 * torch.randn(64, WIDTH), teacher(unseen)
    figures, counts = {"before": squared_error(base, unseen, of_unseen).item()}, {}
    for method in ("lora", "sharelora"):
        model = _net()
        model.load_state_dict(base.state_dict())
        apply_lora(model, LoRAConfig(r=R, lora_alpha=R, method=method, target_modules=["proj"]))
        counts[method] = count_parameters(model)[0]
        fit(partial(squared_error, model, x, want), model, STEPS, 1e-2)
        figures[f"{method}, unseen"] = squared_error(model, unseen, of_unseen).item()
    return {"parameters": counts["sharelora"] / counts["lora"], **figures}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        abs(one["parameters"] - (1 + LAYERS) / (2 * LAYERS)) < 1e-9
        and one["sharelora, unseen"] < min(1.25 * one["lora, unseen"], one["before"])
        for one in figures
    )


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.proj(x))


def _net() -> nn.Sequential:
    return nn.Sequential(*(_Block() for _ in range(LAYERS)))
