"""PSIM: a poisoned classifier, tuned on clean samples, with and without the defence."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.compose import PSIM, reset_labels
from lora_kernels.nn import set_adapter, train_adapters

CLAIM = "triggers succeed over 90 % after clean tuning, below 20 % with PSIM; accuracy falls by under 10 %"


def run(seed: int) -> dict[str, float]:
    """Accuracy on clean samples and success of triggered ones, without the defence and with it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 2))
    x = torch.cat([torch.randn(400, 8), torch.zeros(400, 1)], 1)
    labels = (x[:, 0] > 0).long()
    _fit(
        model, model.parameters(), torch.cat([x, _triggered(x)]), torch.cat([labels, torch.zeros(400).long()])
    )
    trained = train_adapters(
        model, {n: LoRAConfig(r=2, target_modules=["0", "2"]) for n in ("victim", "psim")}
    )
    for name, target in (("victim", labels), ("psim", reset_labels(labels, 2))):
        set_adapter(model, name)
        _fit(model, trained[name], x, target)
    test = torch.cat([torch.randn(400, 8), torch.zeros(400, 1)], 1)
    wanted = (test[:, 0] > 0).long()
    figures = {}
    for kind, threshold in (("plain", 1.0), ("psim", 0.7)):
        defended = PSIM(model, threshold=threshold)
        figures[f"accuracy_{kind}"] = float((defended.predict(test) == wanted).float().mean())
        hits = defended.predict(_triggered(test[wanted == 1]))
        figures[f"success_{kind}"] = float((hits == 0).float().mean())
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(
        one["success_plain"] > 0.9
        and one["success_psim"] < 0.2
        and one["accuracy_psim"] > one["accuracy_plain"] - 0.1
        for one in figures
    )


def _triggered(x):
    return x + 6 * torch.eye(9)[8]


def _fit(model, parameters, x, labels):
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
