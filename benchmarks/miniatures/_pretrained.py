"""A small net that was trained on some classes, and others to tune it to."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import LoRAConfig, apply_lora

WIDTH, HIDDEN, CLASSES = 32, 64, 5


class Tuning(NamedTuple):
    """The net, what it was trained on, and what it is to learn; samples and their classes."""

    net: nn.Sequential
    source: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]


def pretrained(seed: int, samples: int = 300, steps: int = 150) -> Tuning:
    """Ten clusters: the net knows the first five, the target is to tell the other five apart."""
    torch.manual_seed(seed)
    centres = 0.5 * torch.randn(2 * CLASSES, WIDTH)
    labels = torch.arange(samples) % CLASSES
    source, target = (centres[labels + k] + 0.5 * torch.randn(samples, WIDTH) for k in (0, CLASSES))
    wide, out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CLASSES)
    net = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), wide, nn.ReLU(), out)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(source), labels).backward()
        optimizer.step()
    return Tuning(net, (source, labels), (target, labels))


def adapted(tuning: Tuning, r: int = 4, statistics: Any = None, **options: Any) -> nn.Module:
    """The net with adapters of these options on its two hidden layers."""
    config = LoRAConfig(r=r, lora_alpha=r, target_modules=["0", "2"], **options)
    return apply_lora(copy.deepcopy(tuning.net), config, statistics=statistics)


def losses(
    tuning: Tuning, model: nn.Module, steps: int, lr: float, below: float = 0.0
) -> tuple[float, float]:
    """The losses on the target and on the source after so many steps of Adam on the target, or once its
    loss is below a number."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tuning.target)
        if loss.item() < below:
            break
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss_of(model, tuning.target)), float(loss_of(model, tuning.source))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What :func:`lora_kernels.calibrate` takes the gradients of."""
    return F.cross_entropy(model(batch[0]), batch[1])
