"""RoseLoRA: rows of A and columns of B that grow sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..optim._common import check_count, check_number, pairs_of
from ._common import site_name
from .base import Schedule


class RoseLoRA(Schedule):
    """Ī ← β Ī + (1-β) |w · ∂L/∂w|; w ← 0 where Ī is below the k-th smallest of its row of A or column of B

    RoseLoRA (Wang et al., 2024, arXiv 2406.10777). k = ⌊n (1-τ_t)⌋ for rows and columns of n numbers: τ_t is
    1 before t_i, ``density`` from t_f on and a cubic between. Gradients and moments are not masked, so that
    numbers can come back. ΔW then has at most Σ_i nnz(B_:i) · nnz(A_i:) numbers. Step it while the gradients
    are there, before ``zero_grad``.

    Args:
        model: one of :func:`apply_lora` or of PEFT.
        density: τ in (0, 1], the part that stays.
        t_i: the step from which numbers go.
        t_f: the step from which the density is reached.
        beta: β.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, t_f is not above t_i, or the model has no LoRA layers.
    """

    key = "roselora"
    saved = ("importance",)

    def __init__(
        self, model: nn.Module, *, density: float = 0.05, t_i: int = 3, t_f: int = 20, beta: float = 0.8
    ) -> None:
        super().__init__(model)
        check_number("density", density, above=True)
        check_number("beta", beta, 0.0, 1.0)
        check_number("t_i", t_i)
        check_count("t_f", t_f)
        if density > 1:
            raise ValueError(f"density: expected at most 1, got {density}")
        if t_f <= t_i:
            raise ValueError(f"t_f: expected more than t_i = {t_i} steps, got {t_f}")
        self.density, self.t_i, self.t_f, self.beta = density, t_i, t_f, beta
        self.factors: dict[str, tuple[nn.Parameter, int]] = {}
        for pair in pairs_of(model):
            self.factors[f"{site_name(pair)}.A"] = pair.lora_a, 1
            self.factors[f"{site_name(pair)}.B"] = pair.lora_b, 0
        self.importance = {name: torch.zeros_like(p) for name, (p, _) in self.factors.items()}

    def density_at(self, step: int) -> float:
        """τ_t."""
        if step < self.t_i:
            return 1.0
        part = max(0.0, 1 - (step - self.t_i) / (self.t_f - self.t_i))
        return self.density + (1 - self.density) * part**3

    def act(self, step: int) -> None:
        """Follows the importance and zeroes what matters least."""
        trained = {name: (p, dim) for name, (p, dim) in self.factors.items() if p.requires_grad}
        grads: list[Tensor] = []
        for name, (p, _) in trained.items():
            if p.grad is None:
                raise ValueError(f"model: {name}: expected a gradient (step before zero_grad), got None")
            grads.append(p.grad)
        if not trained:
            return
        now = torch._foreach_mul([p for p, _ in trained.values()], grads)
        torch._foreach_abs_(now)
        own = [self.importance[name] for name in trained]
        torch._foreach_lerp_(own, now, 1 - self.beta if step > 1 else 1.0)
        density = self.density_at(step)
        for (p, dim), importance in zip(trained.values(), own, strict=True):
            keep_important_(p, importance, density, dim)


@torch.no_grad()
def keep_important_(weight: Tensor, importance: Tensor, density: float, dim: int) -> None:
    """Zeroes the numbers whose importance is below the ⌊n (1-density)⌋-th smallest along ``dim``."""
    count = int(weight.shape[dim] * (1 - density))
    if count:
        least = importance.kthvalue(count, dim, keepdim=True).values
        weight.masked_fill_(importance < least, 0.0)
