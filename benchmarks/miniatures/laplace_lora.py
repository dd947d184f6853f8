"""Laplace-LoRA: two classes, few samples, and a model that is too sure of itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.stats import LaplaceLoRA

CLAIM = "20 samples of two overlapping classes: lower test NLL and calibration error than the MAP model"
TRAIN, TEST, STEPS, PRIOR_VAR = 20, 500, 150, 3.0


def run(seed: int) -> dict[str, float]:
    """NLL and expected calibration error on fresh samples, of the trained model and of its posterior."""
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    apply_lora(model, LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    x, labels = _samples(TRAIN)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in trained) / (2 * PRIOR_VAR)
        (F.cross_entropy(model(x), labels) + penalty / TRAIN).backward()
        optimizer.step()
    laplace = LaplaceLoRA(model, lambda model, x: model(x), n_kfac=32, prior_var=PRIOR_VAR).fit([(x, labels)])
    test, truth = _samples(TEST)
    with torch.no_grad():
        plain = model(test).softmax(-1)
    found = {"MAP": plain, "Laplace": laplace.predict(test).detach()}
    return {
        f"{name} {figure}": measure(p, truth)
        for name, p in found.items()
        for figure, measure in (("NLL", _nll), ("ECE", _calibration_error))
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """Both figures lower in every seed."""
    return all(one[f"Laplace {name}"] < one[f"MAP {name}"] for one in figures for name in ("NLL", "ECE"))


def _samples(count):
    labels = torch.arange(count) % 2
    return torch.randn(count, 2) + torch.where(labels == 0, -0.7, 0.7)[:, None], labels


def _nll(p, labels):
    return float(F.nll_loss(p.log(), labels))


def _calibration_error(p, labels):
    sure, guess = p.max(-1)
    bins = (sure * 10).long().clamp(max=9)
    gaps = torch.zeros(10).index_add_(0, bins, (guess == labels).float() - sure)
    return float(gaps.abs().sum() / len(labels))
