"""PeriodicLoRA: adapters unloaded into W, all at once or with a momentum."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from ..nn.pairs import Pair
from ..optim._common import check_number
from ._common import merge_, restart_
from ._periodic import Periodic

MODES = ("preserving", "mytransformers")


class PeriodicLoRA(Periodic):
    """W ← W + (1-m) · s · B A, B ← m B every ``every`` steps; A is new for m = 0; no moments

    PeriodicLoRA (Meng et al., 2024, arXiv 2402.16141). The output is the same before and after, and after k
    stages with m = 0 W has moved by a rank of up to k r. How the paper's momentum enters was not found: this
    is our reading, and ``mode="mytransformers"`` that of a public code, W ← W + m · s · B A, A ← (1-m) A,
    B ← (1-m) B, which changes the output. The learning rate may start anew with each stage: give
    ``torch.optim.lr_scheduler.LambdaLR`` a function of the step modulo ``every``.

    Args:
        model: one of :func:`apply_lora` or of PEFT with plain LoRA.
        optimizer: what trains it; it forgets A and B at each unloading.
        every: steps of a stage.
        momentum: m, in [0, 1).
        mode: ``"preserving"`` or ``"mytransformers"``.
        seed: of the new A.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, or W cannot take the adapters (see :class:`ReLoRA`).
    """

    key = "plora"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: int = 500,
        momentum: float = 0.0,
        mode: str = "preserving",
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, every, seed)
        check_number("momentum", momentum, 0.0, 1.0)
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.momentum, self.mode = momentum, mode

    def cycle(self) -> None:
        """Unloads every adapter."""
        for pair in self.pairs:
            if self.mode == "mytransformers":
                _decay_(pair, self.momentum)
            elif self.momentum:
                merge_(pair, 1 - self.momentum)
                pair.lora_b.mul_(self.momentum)
            else:
                merge_(pair)
                restart_(pair, self.rng)
        self.forget()


@torch.no_grad()
def _decay_(pair: Pair, momentum: float) -> None:
    merge_(pair, momentum)
    pair.lora_a.mul_(1 - momentum)
    pair.lora_b.mul_(1 - momentum)
