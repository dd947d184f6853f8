"""AutoLoRa: natural samples go through B A, so that W learns from attacked ones."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import TwoBranches, autolora_lambdas, pgd, two_branch_loss

CLAIM = (
    "two noisy clusters: W gets no gradient of natural samples and B A none of attacked ones; on attacked"
    " unseen samples the accuracy without the adapters is at least that of TRADES with weight 6, less a"
    " hundredth"
)
WIDTH, HIDDEN, SAMPLES, STEPS = 16, 32, 128, 60
ATTACK = {"radius": 0.1, "step": 0.03, "steps": 5}


def run(seed: int) -> dict[str, float]:
    """The accuracies on attacked unseen samples, and the gradients that must not be there."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    (x, labels), (unseen, of_unseen) = _samples(SAMPLES), _samples(512)
    trades = _trades(copy.deepcopy(base), x, labels)
    model = apply_lora(base, LoRAConfig(r=4, target_modules=["0"]))
    branches = TwoBranches(model, head=[model[2]])
    optimizer = torch.optim.SGD(branches.parameters(), lr=0.1, momentum=0.9)
    accuracy = 0.5
    for _ in range(STEPS):
        attacked = pgd(branches.adversarial, x, labels, **ATTACK)
        optimizer.zero_grad()
        natural = branches.natural(x)
        loss = two_branch_loss(natural, branches.adversarial(attacked), labels, *autolora_lambdas(accuracy))
        loss.backward()
        optimizer.step()
        accuracy = _accuracy(natural, labels)
    optimizer.zero_grad()
    F.cross_entropy(branches.natural(x), labels).backward()
    of_natural = model[0].weight.grad
    optimizer.zero_grad()
    F.cross_entropy(branches.adversarial(x), labels).backward()
    of_attacked = model[0].adapters["default"].lora_B.grad
    return {
        "TRADES": _robust(trades, unseen, of_unseen),
        "AutoLoRa": _robust(branches.adversarial, unseen, of_unseen),
        "stray gradients": sum(float(g.norm()) for g in (of_natural, of_attacked) if g is not None),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """All of it, in every seed."""
    return all(one["AutoLoRa"] >= one["TRADES"] - 0.01 and one["stray gradients"] == 0 for one in figures)


def _trades(model: nn.Module, x: Tensor, labels: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        attacked = pgd(model, x, labels, **ATTACK)
        optimizer.zero_grad()
        natural = model(x)
        kl = F.kl_div(model(attacked).log_softmax(-1), natural.softmax(-1), reduction="batchmean")
        (F.cross_entropy(natural, labels) + 6 * kl).backward()
        optimizer.step()
    return model


def _robust(model: object, x: Tensor, labels: Tensor) -> float:
    return _accuracy(model(pgd(model, x, labels, **ATTACK)), labels)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean())


def _samples(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 2
    centre = 0.5 + 0.15 * (2 * labels[:, None] - 1) * (torch.arange(WIDTH) < WIDTH // 2)
    return (centre + 0.2 * torch.randn(count, WIDTH)).clamp(0, 1), labels
