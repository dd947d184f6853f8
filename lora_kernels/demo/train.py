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
from ..optim import lora_plus_groups
from .data import Task
from .model import Batch, Frozen, accuracy, batches, choose_decay, features, fit_head, load_encoder, pooled
from .sizes import DRAWS, Cost, Sizes

RANK = 8
TARGETS = ["query", "key", "value", "dense"]
EXCLUDED = ["pooler.dense"]
BATCH = 8


@dataclass
class Outcome:
    """What one label set came to: held-out accuracies, one a draw of the training texts."""

    task: str
    classes: int
    train: int
    test: int
    frozen: list[float]
    lora: list[float]
    layers: int
    losses: list[float]
    seconds: float
    reload_difference: float
    path: Path

    @property
    def margin(self) -> float:
        """How far LoRA is above frozen features, on the draws that both had."""
        return statistics.mean(self.lora) - statistics.mean(self.frozen[: len(self.lora)])

    @property
    def spread(self) -> float:
        """The widest range of either over its draws."""
        return max(max(scores) - min(scores) for scores in (self.frozen, self.lora))


@dataclass
class Setting:
    """What all label sets have in common."""

    path: str
    tokenizer: Any
    frozen: Frozen
    output: Path
    sizes: Sizes
    tick: Callable[[], object]


def adapt(path: str) -> Any:
    """The encoder at ``path`` with PEFT's LoRA on its linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=16, lora_dropout=0.1, target_modules=TARGETS, exclude_modules=EXCLUDED
    )
    return get_peft_model(load_encoder(path), config)


def run_task(task: Task, at: Setting) -> Outcome:
    """Baselines, fine-tuning, saving and reloading for one label set."""
    at.frozen.read([text for text, _ in task.train + task.test], at.tick)
    draws = [_draw(task.train, at.sizes.train, seed) for seed in range(DRAWS)]
    decay = choose_decay(*at.frozen(draws[0]), len(task.classes))
    heads = [fit_head(*at.frozen(draw), len(task.classes), decay) for draw in draws]
    x, labels = at.frozen(task.test)
    frozen = [accuracy(head(x), labels) for head in heads]
    start = time.perf_counter()
    runs = [tuned(task, draws[seed], heads[seed], seed, at) for seed in range(at.sizes.seeds)]
    seconds = time.perf_counter() - start
    model, head, losses, _ = runs[0]
    target = at.output / task.name.replace(" ", "_")
    model.save_pretrained(target)
    torch.save(head.state_dict(), target / "head.pt")
    difference = reload_difference(model, at.path, target, batches(at.tokenizer, task.test[:64], 64)[0])
    sizes = (len(task.classes), len(draws[0]), len(task.test))
    layers = len(accelerate(model).accelerated)
    lora = [score for *_, score in runs]
    return Outcome(task.name, *sizes, frozen, lora, layers, losses, seconds, difference, target)


def _draw(pairs: list[tuple[str, int]], size: int, seed: int) -> list[tuple[str, int]]:
    return random.Random(seed).sample(pairs, min(size, len(pairs)))


def tuned(
    task: Task, draw: list[tuple[str, int]], head: nn.Linear, seed: int, at: Setting
) -> tuple[Any, nn.Linear, list[float], float]:
    """The encoder trained on a draw, its head, the loss of each step and the held-out accuracy."""
    torch.manual_seed(seed)
    model = adapt(at.path)
    accelerate(model)
    head = copy.deepcopy(head)
    losses = fine_tune(model, head, batches(at.tokenizer, draw, BATCH), at.sizes.epochs, at.tick, seed)
    x, labels = features(model.eval(), batches(at.tokenizer, task.test, 64), at.tick)
    with torch.no_grad():
        return model, head, losses, accuracy(head(x), labels)


def fine_tune(
    model: Any, head: nn.Linear, train: list[Batch], epochs: int, tick: Callable[[], object], seed: int = 0
) -> list[float]:
    """Trains the adapters, and the head from where the baseline left it; returns the loss of each step."""
    model.train()
    # The steps are few, and B starts at zero: it learns faster.
    groups = lora_plus_groups(model, lr=1e-3, ratio=6.0)
    groups.append({"params": list(head.parameters()), "lr": 3e-3})
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=max(2, epochs * len(train)), pct_start=0.1
    )
    rng, losses = random.Random(seed), []
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


def ticks(tasks: list[Task], sizes: Sizes) -> int:
    """The steps of a run, about: what a progress bar counts to."""
    steps = sum(-(-min(sizes.train, len(t.train)) // BATCH) * sizes.epochs for t in tasks) * sizes.seeds
    read = sum(-(-(len(t.train) + (1 + sizes.seeds) * len(t.test)) // 64) for t in tasks)
    return steps + read + len(tasks) + 1


def first_steps(
    path: str, tokenizer: Any, pairs: list[tuple[str, int]], repeats: int, seconds: float
) -> tuple[dict[str, list[float]], Cost]:
    """The timing of `compare_steps` on texts of middle length, and from it what a text of ``pairs`` costs."""
    ordered = sorted(random.Random(0).sample(pairs, min(1024, len(pairs))), key=lambda pair: len(pair[0]))
    middle = max(0, (len(ordered) - BATCH) // 2)
    batch = batches(tokenizer, ordered[middle : middle + BATCH], BATCH)[0]
    times = compare_steps(path, batch, repeats, seconds)
    tokens = sum(b.inputs["input_ids"].numel() for b in batches(tokenizer, ordered, BATCH)) / len(ordered)
    step, forward = (
        statistics.median(times[name]) / 1e3 / batch.inputs["input_ids"].numel() * tokens
        for name in ("lora-kernels", "forward")
    )
    return times, Cost(step, forward)


def compare_steps(path: str, batch: Batch, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a training step of the encoder, PEFT and fused taken in turn, and of reading alone.

    At most ``repeats`` rounds, fewer once ``seconds`` are over, and at least three.
    """
    fused = adapt(path).train()
    peft = copy.deepcopy(fused)
    accelerate(fused)
    decelerate(peft)
    times: dict[str, list[float]] = {"PEFT": [], "lora-kernels": [], "forward": []}
    begin = time.perf_counter()
    while len(times["forward"]) <= repeats:
        for name, model in (("PEFT", peft), ("lora-kernels", fused)):
            start = time.perf_counter()
            pooled(model, batch).square().sum().backward()
            times[name].append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        with torch.no_grad():
            pooled(fused, batch)
        times["forward"].append(1e3 * (time.perf_counter() - start))
        if len(times["forward"]) > 3 and time.perf_counter() - begin > seconds:
            break
    return {name: values[1:] for name, values in times.items()}  # the first round warms up


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(times)
    return statistics.median(ordered), ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
