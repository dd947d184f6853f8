"""MoSA: a few samples of another style are enough for a low-rank change of filters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, apply_lora

from ._fit import fit

CLAIM = (
    "a net of two convolutions and a change of its first filters of rank 1, seen in 4 noisy samples: MoSA"
    " with r = 1 has less error on unseen ones than fine-tuning everything"
)
CHANNELS, SIZE, SAMPLES, STEPS = 8, 6, 4, 120


def run(seed: int) -> dict[str, float]:
    """The error on unseen samples of the new style over that before."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Tanh(), nn.Conv2d(CHANNELS, 2, 3, padding=1))
    styled = copy.deepcopy(net)
    with torch.no_grad():  # loralib's form: rows and columns of a matrix [out · 3, in · 3]
        styled[0].weight += 0.5 * (torch.randn(3 * CHANNELS, 1) @ torch.randn(1, 9)).view_as(styled[0].weight)
        x, unseen = torch.randn(SAMPLES, 3, SIZE, SIZE), torch.randn(128, 3, SIZE, SIZE)
        want, of_unseen = styled(x), styled(unseen)
        want = want + 0.3 * want.std() * torch.randn_like(want)
    figures = {}
    for name in ("full", "MoSA"):
        model = copy.deepcopy(net)
        if name == "MoSA":
            apply_lora(model, LoRAConfig(r=1, lora_alpha=1, target_modules=["0"], method="mosa_conv"))

        def loss(x: Tensor, want: Tensor, model: nn.Module = model) -> Tensor:
            return (model(x) - want).square().mean()

        before = float(loss(unseen, of_unseen).detach())
        trained = [p for p in model.parameters() if p.requires_grad]
        fit(lambda loss=loss: loss(x, want), trained, STEPS, 1e-2)
        figures[name] = float(loss(unseen, of_unseen).detach()) / before
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["MoSA"] < one["full"] for one in figures)
