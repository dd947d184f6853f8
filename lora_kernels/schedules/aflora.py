"""AFLoRA's freezer: A and B stop learning where it matters least."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.pairs import Pair
from ..optim._common import check_count, check_number, pairs_of
from ._common import site_name
from ._freezing import freeze
from .base import Schedule


class AFLoRAFreezer(Schedule):
    """Every ``window`` steps each A and B freezes whose mean score is below a quantile of all scores

    AFLoRA (Liu et al., 2024, arXiv 2403.13269). With I the mean of |∂loss/∂w| over a window, at its end
    Ī ← β₁ Ī + (1-β₁) I and Ū ← β₂ Ū + (1-β₂) |I - Ī|; the score is Ī ⊙ Ū. Below the
    :func:`aflora_fraction` p of what is left, thr is the ⌊N (1-p)⌋-th smallest of the N scores of all that
    still trains. A and B freeze apart and for good; after ``total_steps - t_f`` none trains. Reads the
    gradients of a step, so that it comes before they are set to zero. Meant for the method ``aflora``, and
    works on any layer with an A and a B.

    Args:
        model: one of :func:`apply_lora` or of PEFT.
        total_steps: T.
        t_i: steps before the first may freeze (the paper: an epoch).
        t_f: steps at the end in which none trains (the paper: 7 or 14 of 20 epochs).
        window: ΔT.
        betas: β₁ and β₂.

    Raises:
        ValueError: no A or B trains, or a number is out of range; in :meth:`step`, one that trains has no
            gradient.
    """

    key = "aflora_freezer"
    saved = ("states", "frozen")

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        t_i: int,
        t_f: int,
        window: int = 10,
        betas: tuple[float, float] = (0.85, 0.95),
    ) -> None:
        super().__init__(model)
        for name, value in (("total_steps", total_steps), ("window", window)):
            check_count(name, value)
        for name, number in (("t_i", t_i), ("t_f", t_f)):
            check_number(name, number)
        if t_i + t_f >= total_steps:
            raise ValueError(f"total_steps: expected more than t_i + t_f = {t_i + t_f}, got {total_steps}")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, 0.0, 1.0)
        self.total_steps, self.t_i, self.t_f = total_steps, t_i, t_f
        self.window, self.betas = window, betas
        self.places: dict[str, tuple[Pair, str, nn.Parameter]] = {
            f"{site_name(pair)}.{name}": (pair, name, factor)
            for pair in pairs_of(model)
            for name, factor in (("lora_A", pair.lora_a), ("lora_B", pair.lora_b))
            if factor.requires_grad
        }
        if not self.places:
            raise ValueError("model: expected layers whose A or B trains, got none")
        # The window's mean, Ī and Ū of each.
        self.states: dict[str, Tensor] = {
            name: torch.zeros(3, *factor.shape, device=factor.device)
            for name, (_, _, factor) in self.places.items()
        }
        self.frozen: list[str] = []

    @property
    def training(self) -> list[str]:
        """What still trains, by name."""
        return [name for name in self.places if name not in self.frozen]

    def act(self, step: int) -> None:
        """Takes the step's gradients in, and freezes where a window ends."""
        training = self.training
        missing = [name for name in training if self.places[name][2].grad is None]
        if missing:
            raise ValueError(f"model: expected gradients (step before zero_grad), got none of {missing[0]}")
        for name in training:
            self._take(self.states[name], self.places[name][2].grad, step)
        if step > self.total_steps - self.t_f:
            self._freeze(training)
        elif step > self.t_i and step % self.window == 0 and training:
            self._freeze(self._least(step, training))

    def _take(self, state: Tensor, grad: Tensor, step: int) -> None:
        mean, smooth, spread = state
        within = (step - 1) % self.window
        mean.lerp_(grad.abs().to(mean.dtype), 1 / (within + 1))
        if within == self.window - 1:
            smooth.lerp_(mean, 1 - self.betas[0])
            spread.lerp_((mean - smooth).abs(), 1 - self.betas[1])

    def _least(self, step: int, training: list[str]) -> list[str]:
        scores = {name: self.states[name][1] * self.states[name][2] for name in training}
        every = torch.cat([score.flatten() for score in scores.values()])
        left = aflora_fraction(step, self.total_steps, self.t_i, self.t_f)
        rank = int(len(every) * (1 - left))
        if rank < 1:
            return []
        threshold = every.kthvalue(rank).values
        return [name for name, score in scores.items() if score.mean() < threshold]

    def _freeze(self, names: list[str]) -> None:
        for name in names:
            pair, factor, _ = self.places[name]
            freeze(pair, factor)
        self.frozen = [*self.frozen, *names]

    def check_state(self, name: str, own: Any, given: Any) -> None:
        """What is frozen must be there."""
        super().check_state(name, own, given)
        unknown = [one for one in given if one not in self.places] if name == "frozen" else []
        if unknown:
            raise ValueError(
                f"state['frozen']: expected some of {', '.join(self.places)}, got {unknown[0]!r}"
            )

    def restored(self) -> None:
        """Freezes what was frozen."""
        names, self.frozen = self.frozen, []
        self._freeze(names)


def aflora_fraction(step: float, total_steps: float, t_i: float, t_f: float) -> float:
    """p: 1 up to t_i, 0 after T - t_f, between them (1 - (t - t_i) / (T - t_i - t_f))³.

    Examples:
        >>> aflora_fraction(step=0, total_steps=100, t_i=10, t_f=20)
        1.0
    """
    if step <= t_i:
        return 1.0
    if step > total_steps - t_f:
        return 0.0
    return float((1 - (step - t_i) / (total_steps - t_i - t_f)) ** 3)
