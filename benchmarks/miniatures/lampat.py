"""LAMPAT: what the adapters learn holds under small changes of the embeddings."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import adversarial_step

CLAIM = (
    "a small language model: after the same steps its logits move by less than half of what LoRA's do,"
    " squared, under changes of the embeddings of the size it was trained with"
)
VOCABULARY, WIDTH, LENGTH, STEPS, RADIUS = 24, 32, 8, 60, 1.0


def run(seed: int) -> dict[str, float]:
    """The loss, and the mean square by which logits move under random changes of that length."""
    torch.manual_seed(seed)
    base = _net()
    tokens = (torch.randint(VOCABULARY, (32, 1)) + torch.arange(LENGTH)) % VOCABULARY
    embeddings = torch.randn(VOCABULARY, WIDTH)[tokens]

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:])

    change = torch.randn_like(embeddings)
    change = RADIUS * change / change.norm(dim=(1, 2), keepdim=True)
    figures = {}
    for name in ("LoRA", "LAMPAT"):
        torch.manual_seed(seed)
        model = apply_lora(copy.deepcopy(base), LoRAConfig(r=8, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(STEPS):
            optimizer.zero_grad()
            if name == "LAMPAT":
                adversarial_step(model, embeddings, loss, lr=RADIUS, radius=RADIUS, seed=step)
            else:
                loss(model(embeddings)).backward()
            optimizer.step()
        with torch.no_grad():
            clean = model(embeddings)
            figures[f"{name}, loss"] = float(loss(clean))
            figures[f"{name}, moved"] = float((model(embeddings + change) - clean).square().mean())
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["LAMPAT, moved"] < 0.5 * one["LoRA, moved"] for one in figures)


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, VOCABULARY)
    )
