"""CLIP-LoRA: two small towers, pre-trained together, that meet new classes with four samples each."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import remove_lora
from lora_kernels.nn.methods.clip_lora import few_shot_loss

CLAIM = "rank 2 on both towers beats no tuning on new classes, and is at least as good as on one tower"
CLASSES, SHOTS, WIDTH = 8, 4, 16


def run(seed: int) -> dict[str, float]:
    """Accuracy on new samples of the new classes: without tuning, each tower, both."""
    torch.manual_seed(seed)
    towers = nn.ModuleDict({name: _tower() for name in ("text", "vision")})
    seen = _world()
    _train(towers, [p for p in towers.parameters()], *_samples(*seen, 64), 300)
    moved = tuple(one + 0.7 * torch.randn_like(one) for one in seen)
    few, test = _samples(*moved, SHOTS), _samples(*moved, 64)
    figures = {"zero_shot": _accuracy(towers, *test)}
    for kind, targets in (("text", r"text\..*"), ("vision", r"vision\..*"), ("both", r"(text|vision)\..*")):
        config = LoRAConfig(r=2, lora_alpha=1, use_rslora=True, lora_dropout=0.25, target_modules=targets)
        towers.train()
        apply_lora(towers, config)
        _train(towers, [p for p in towers.parameters() if p.requires_grad], *few, 150)
        figures[kind] = _accuracy(towers.eval(), *test)
        remove_lora(towers)
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed, by at least what 1 % is for both against the better tower."""
    return all(
        one["both"] > one["zero_shot"] and one["both"] >= max(one["text"], one["vision"]) - 0.01
        for one in figures
    )


def _tower():
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 8))


def _world():
    return torch.randn(CLASSES, WIDTH), torch.randn(CLASSES, WIDTH)


def _samples(texts, images, each):
    labels = torch.arange(CLASSES).repeat(each)
    return texts, images[labels] + 0.8 * torch.randn(len(labels), WIDTH), labels


def _train(towers, parameters, texts, images, labels, steps):
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        few_shot_loss(towers["vision"](images), towers["text"](texts), labels, 10.0).backward()
        optimizer.step()


@torch.no_grad()
def _accuracy(towers, texts, images, labels):
    scores = (
        nn.functional.normalize(towers["vision"](images), dim=-1)
        @ nn.functional.normalize(towers["text"](texts), dim=-1).T
    )
    return float((scores.argmax(1) == labels).float().mean())
