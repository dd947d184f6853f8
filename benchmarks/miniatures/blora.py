"""Bayesian-LoRA: open gates cost, and those that do not pay close."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import BLoRA, bit_operations, blora_gate_loss

from ._change import random_change

CLAIM = (
    "with a rising price of gates the bit operations of r = 8 fall in every step, at the middle price to less"
    " than 30 % with less than 5 % of a change of rank 2 left"
)
WIDTH, RANK, R, STEPS, PRICES = 24, 2, 8, 300, (0.0, 3e-4, 3e-3)


def run(seed: int) -> dict[str, float]:
    """Bit operations over those of all gates open, the rank and what is left of the change, by price."""
    x, change = random_change(seed, WIDTH, RANK)
    found = {}
    for price in PRICES:
        torch.manual_seed(seed)
        layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, method="blora")
        adapter, want = layer.adapters["default"], x @ (layer.weight.detach() + change).T
        whole = bit_operations(layer)
        gates = [adapter.bit_gates, adapter.rank_gates]
        factors = [adapter.lora_A, adapter.lora_B, adapter.lora_E]
        optimizer = torch.optim.Adam([{"params": factors, "lr": 1e-2}, {"params": gates, "lr": 1e-1}])
        schedule = BLoRA(layer, warmup=STEPS // 3, seed=seed)
        for _ in range(STEPS):
            optimizer.zero_grad()
            ((layer(x) - want).square().mean() + price * blora_gate_loss(layer)).backward()
            optimizer.step()
            schedule.step()
        layer.eval()
        left = float((adapter.delta().detach() - change).norm() / change.norm())
        found |= {
            f"price {price:g}, operations": bit_operations(layer) / whole,
            f"price {price:g}, rank": float(adapter.rank_gate().detach().sum()),
            f"price {price:g}, left": left,
        }
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    costs = [[one[f"price {price:g}, operations"] for price in PRICES] for one in figures]
    left = [one[f"price {PRICES[1]:g}, left"] for one in figures]
    return all(a > b > c and b < 0.3 for a, b, c in costs) and max(left) < 0.05
