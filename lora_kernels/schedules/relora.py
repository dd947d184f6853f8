"""ReLoRA: a high rank out of restarts of a low one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim._common import check_count, check_number
from ._common import fill_
from ._periodic import Periodic


class ReLoRA(Periodic):
    """W ← W + s · B A, A ← Kaiming-uniform, B ← 0 every ``every`` steps; the moments are pruned

    ReLoRA (Lialin et al., 2023, arXiv 2307.05695). The output is the same before and after, and after k
    restarts W has moved by a rank of up to k r. Of each moment of A and B the ``ratio`` smallest numbers
    become zero, or as many by lot. The learning rate should fall to zero at a restart and warm up
    again: :func:`jagged_cosine`. A quantised W is quantised anew, which loses a little each time.

    Args:
        model: one of :func:`apply_lora` or of PEFT with plain LoRA; what else trains in it goes on.
        optimizer: what trains it.
        every: steps from one restart to the next.
        start: steps before the first period begins (a warm start).
        prune: ``"magnitude"`` or ``"random"``.
        ratio: the part of each moment that becomes zero; 1 forgets it all.
        seed: of the new A and of the lot.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, or W cannot take the adapters (see ``mergeable_pairs``).
    """

    key = "relora"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: int = 1000,
        start: int = 0,
        prune: str = "magnitude",
        ratio: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, every, seed)
        check_number("start", start)
        check_number("ratio", ratio)
        if ratio > 1:
            raise ValueError(f"ratio: expected at most 1, got {ratio}")
        if prune not in ("magnitude", "random"):
            raise ValueError(f"prune: expected 'magnitude' or 'random', got {prune!r}")
        self.start, self.prune, self.ratio = start, prune, ratio

    def due(self, step: int) -> bool:
        """A period after the start, and every one from there."""
        return step > self.start and (step - self.start) % self.every == 0

    def cycle(self) -> None:
        """Merges, starts anew and prunes the moments."""
        self.merge_and_restart()
        for moment in self.moments():
            prune_(moment, self.ratio, self.rng if self.prune == "random" else None)


@torch.no_grad()
def prune_(moment: Tensor, ratio: float, rng: torch.Generator | None = None) -> None:
    """Zeroes the ``ratio`` smallest of the numbers, or with ``rng`` as many by lot, in place."""
    count = int(ratio * moment.numel())
    sizes = moment.abs().flatten()
    if rng is not None:
        fill_(sizes, rng, "uniform_")
    moment.view(-1)[sizes.topk(count, largest=False).indices] = 0


def jagged_cosine(
    total: int, restart: int, *, warmup: int = 100, first_warmup: int | None = None, floor: float = 0.1
) -> Callable[[int], float]:
    """c(t) = m + (1-m) ½ (1 + cos(π (t - w₀)/(S - w₀))), from 0 up to it over w steps after each restart

    For ``torch.optim.lr_scheduler.LambdaLR``: t / w₀ for the first w₀ steps;
    ((t mod R)/w) · c(t - t mod R + w) for w steps from each multiple of R on; else c(t).

    Args:
        total: S, the steps of the whole training.
        restart: R, ``every`` of :class:`ReLoRA`.
        warmup: w.
        first_warmup: w₀, by default w.
        floor: m, where the cosine ends.

    Raises:
        TypeError: a number is none.
        ValueError: a number is out of range; a phase does not fit: w ≥ R, or S ≤ w₀ or S < R.

    Examples:
        >>> optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
        >>> curve = jagged_cosine(1000, 250, warmup=10)
        >>> rate = torch.optim.lr_scheduler.LambdaLR(optimizer, curve)
    """
    first = warmup if first_warmup is None else first_warmup
    for name, value in (("total", total), ("restart", restart), ("warmup", warmup), ("first_warmup", first)):
        check_count(name, value)
    check_number("floor", floor, 0.0, 1.0)
    if warmup >= restart:
        raise ValueError(f"warmup: expected fewer than the {restart} steps between restarts, got {warmup}")
    if total <= first or total < restart:
        raise ValueError(f"total: expected more than {max(first, restart - 1)} steps, got {total}")

    def cosine(t: int) -> float:
        part = min((t - first) / (total - first), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))

    def factor(t: int) -> float:
        since = t % restart
        if t < first:
            return t / first
        return since / warmup * cosine(t - since + warmup) if t >= restart and since < warmup else cosine(t)

    return factor
