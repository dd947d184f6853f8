"""LoRA fine-tuning through ``accelerate``, the check against PEFT alone, and the timing."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..integrations.peft import accelerate, decelerate
from .data import Task
from .model import Batch, accuracy, batches, features, fit_head, load_encoder, pooled

RANK = 8
TARGETS = ["query", "key", "value", "dense"]
EXCLUDED = ["pooler.dense"]


@dataclass
class Outcome:
    """What one label set came to."""

    task: str
    classes: int
    train: int
    test: int
    frozen: float
    lora: float
    layers: int
    losses: list[float]
    seconds: float
    reload_difference: float
    path: Path


def adapt(path: str) -> Any:
    """The encoder at ``path`` with PEFT's LoRA on its linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=16, lora_dropout=0.1, target_modules=TARGETS, exclude_modules=EXCLUDED
    )
    return get_peft_model(load_encoder(path), config)


def run_task(
    task: Task, path: str, tokenizer: Any, output: Path, epochs: int, tick: Callable[[], None]
) -> Outcome:
    """Baseline, fine-tuning, saving and reloading for one label set."""
    torch.manual_seed(0)
    train, test = batches(tokenizer, task.train, 32), batches(tokenizer, task.test, 64)
    model = adapt(path)
    report = accelerate(model)
    with model.disable_adapter():
        head = fit_head(*features(model, train, tick), len(task.classes))
        frozen = _score(model, head, test, tick)
    start = time.perf_counter()
    losses = fine_tune(model, head, train, epochs, tick)
    seconds = time.perf_counter() - start
    lora = _score(model, head, test, tick)
    target = output / task.name.replace(" ", "_")
    model.save_pretrained(target)
    torch.save(head.state_dict(), target / "head.pt")
    difference = reload_difference(model, path, target, test[0])
    sizes = (len(task.classes), len(task.train), len(task.test))
    return Outcome(
        task.name, *sizes, frozen, lora, len(report.accelerated), losses, seconds, difference, target
    )


def _score(model: Any, head: nn.Linear, test: list[Batch], tick: Callable[[], None]) -> float:
    model.eval()
    x, labels = features(model, test, tick)
    with torch.no_grad():
        return accuracy(head(x), labels)


def fine_tune(
    model: Any, head: nn.Linear, train: list[Batch], epochs: int, tick: Callable[[], None]
) -> list[float]:
    """Trains the adapters, and the head from where the baseline left it; returns the loss of each step."""
    model.train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": adapters, "lr": 1e-3}, {"params": head.parameters(), "lr": 3e-3}]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [1e-3, 3e-3], total_steps=max(2, epochs * len(train)), pct_start=0.1
    )
    rng, losses = random.Random(0), []
    for _ in range(epochs):
        for batch in rng.sample(train, len(train)):
            loss = F.cross_entropy(head(pooled(model, batch)), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            tick()
    return losses


@torch.no_grad()
def reload_difference(model: Any, path: str, checkpoint: Path, batch: Batch) -> float:
    """The largest difference of the features between our model and the checkpoint in PEFT alone."""
    from peft import PeftModel

    fresh = PeftModel.from_pretrained(load_encoder(path), checkpoint).eval()
    return (pooled(model.eval(), batch) - pooled(fresh, batch)).abs().max().item()


def compare_steps(path: str, batch: Batch, repeats: int, tick: Callable[[], None]) -> dict[str, list[float]]:
    """Milliseconds of a training step of the whole encoder, PEFT and fused taken in turn."""
    fused = adapt(path).train()
    peft = copy.deepcopy(fused)
    accelerate(fused)
    decelerate(peft)
    times: dict[str, list[float]] = {"PEFT": [], "lora-kernels": []}
    for i in range(repeats + 1):
        for name, model in (("PEFT", peft), ("lora-kernels", fused)):
            start = time.perf_counter()
            pooled(model, batch).square().sum().backward()
            if i:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
        tick()
    return times


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(times)
    return statistics.median(ordered), ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
