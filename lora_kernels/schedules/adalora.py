"""AdaLoRA's allocator: the ranks of a budget go where they matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..optim._common import alike, check_count, check_number
from ._common import active_of
from .base import Schedule


class AdaLoRA(Schedule):
    """S_i = Ī_E Ū_E + mean_j Ī_A Ū_A + mean_j Ī_B Ū_B of each rank i; E_i ← 0 for the least of them

    AdaLoRA (Zhang et al., 2023, arXiv 2303.10512) with PEFT's numbers, on adapters of
    ``LoRAConfig(method="adalora")``: I = |w · ∂L/∂w|, Ī ← β₁ Ī + (1-β₁) I, Ū ← β₂ Ū + (1-β₂) |I - Ī|. The
    budget over all layers falls from r to ``target_r`` a layer by a cubic between step ``tinit`` and the
    last ``tfinal``; in those the ranks stay as they are. Step it while the gradients are there, before
    ``zero_grad``. Add :func:`adalora_penalty` to the loss, and call :func:`compact` once training is done.

    Args:
        model: one of :func:`apply_lora` with such adapters.
        total_steps: of the training.
        target_r: the mean rank at the end.
        tinit: steps before ranks are taken away.
        tfinal: steps at the end with the last ranks.
        delta_t: steps between two allocations.
        beta1: β₁.
        beta2: β₂.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, the steps do not hold the phases, the target is above the rank,
            or the model has no such adapters.
    """

    key = "adalora"
    saved = ("mean", "spread", "kept")

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        target_r: int = 8,
        tinit: int = 0,
        tfinal: int = 0,
        delta_t: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        super().__init__(model)
        for name, count in (("total_steps", total_steps), ("target_r", target_r), ("delta_t", delta_t)):
            check_count(name, count)
        for name, steps in (("tinit", tinit), ("tfinal", tfinal)):
            check_number(name, steps)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            check_number(name, beta, 0.0, 1.0, above=True)
        if tinit + tfinal >= total_steps:
            raise ValueError(
                f"total_steps: expected more than tinit + tfinal = {tinit + tfinal}, got {total_steps}"
            )
        self.adapters = active_of(model, self.key)
        self.initial = sum(len(one.lora_E) for one in self.adapters.values())
        self.target = target_r * len(self.adapters)
        if self.target > self.initial:
            raise ValueError(f"target_r: expected at most the mean rank of the adapters, got {target_r}")
        self.total, self.tinit, self.tfinal, self.delta_t = total_steps, tinit, tfinal, delta_t
        self.betas = beta1, beta2
        self.mean = {name: torch.zeros_like(p) for name, p in self._params()}
        self.spread = {name: torch.zeros_like(p) for name, p in self._params()}
        self.kept = {
            name: torch.ones(len(one.lora_E), dtype=torch.bool, device=one.lora_E.device)
            for name, one in self.adapters.items()
        }

    def budget(self, step: int) -> tuple[int, bool]:
        """How many ranks there may be at this step, and whether to allocate them."""
        if step <= self.tinit:
            return self.initial, False
        if step >= self.total - self.tfinal:
            return self.target, step == self.total - self.tfinal
        left = 1 - (step - self.tinit) / (self.total - self.tfinal - self.tinit)
        budget = int((self.initial - self.target) * left**3 + self.target)
        return budget, step % self.delta_t == 0

    def act(self, step: int) -> None:
        """Follows the importance, and allocates where it is time."""
        last = self.total - self.tfinal
        budget, due = self.budget(step)
        if step < last:
            self._follow()
        if due and budget < self.initial:
            self._allocate(budget)
        if due or step > last:
            for name, one in self.adapters.items():
                one.lora_E.data.mul_(self.kept[name][:, None])

    def _params(self) -> list[tuple[str, nn.Parameter]]:
        names = ("lora_A", "lora_B", "lora_E")
        return [(f"{key}.{name}", getattr(one, name)) for key, one in self.adapters.items() for name in names]

    def _follow(self) -> None:
        params = self._params()
        grads: list[Tensor] = []
        for name, p in params:
            if p.grad is None:
                raise ValueError(f"model: {name}: expected a gradient (step before zero_grad), got None")
            grads.append(p.grad)
        mean, spread = ([kept[name] for name, _ in params] for kept in (self.mean, self.spread))
        now = torch._foreach_mul([p for _, p in params], grads)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(mean, now, 1 - self.betas[0])
        torch._foreach_sub_(now, mean)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(spread, now, 1 - self.betas[1])

    def _allocate(self, budget: int) -> None:
        scores = {name: self._score(name) for name in self.adapters}
        least = torch.cat(list(scores.values())).kthvalue(self.initial - budget).values
        self.kept = {name: score > least for name, score in scores.items()}

    def _score(self, name: str) -> Tensor:
        a, b, e = (
            self.mean[f"{name}.{x}"] * self.spread[f"{name}.{x}"] for x in ("lora_A", "lora_B", "lora_E")
        )
        return e[:, 0] + (a.mean(1) + b.mean(0))


def adalora_penalty(model: nn.Module) -> Tensor:
    """The mean over all A and B of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖, PEFT's; it takes half of it into the loss.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="adalora")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> loss = 0.5 * adalora_penalty(model)
    """
    adapters = active_of(model, AdaLoRA.key).values()
    factors = [factor for one in adapters for factor in (one.lora_A, one.lora_B)]
    penalty: Tensor = _Orthogonality.apply(*factors)
    return penalty


class _Orthogonality(torch.autograd.Function):
    """The gradient of the mean of n norms ‖A Aᵀ - I‖ is 2/n · (A Aᵀ - I) A / ‖A Aᵀ - I‖, 0 where that is 0;
    of B it is that of Bᵀ. Every second factor is a B.
    """

    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        ctx.places = list(alike(factors, [(i % 2, factor.shape) for i, factor in enumerate(factors)]))
        stacks = [torch.stack([factors[i] for i in places]) for places in ctx.places]
        ofs = [places[0] % 2 for places in ctx.places]
        gaps = [s.mT @ s if of_b else s @ s.mT for of_b, s in zip(ofs, stacks, strict=True)]
        for gap in gaps:
            gap.diagonal(dim1=1, dim2=2).sub_(1.0)
        norms = [torch.linalg.matrix_norm(gap) for gap in gaps]
        ctx.save_for_backward(*norms, *gaps, *stacks)
        ctx.count = len(factors)
        return torch.stack([norm.sum() for norm in norms]).sum() / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * ctx.count
        saved, groups = ctx.saved_tensors, len(ctx.places)
        parts = zip(ctx.places, saved[:groups], saved[groups : 2 * groups], saved[2 * groups :], strict=True)
        for places, norms, gaps, stack in parts:
            scales = 2 * dy / ctx.count / norms.clamp(min=torch.finfo(norms.dtype).tiny)
            scaled = gaps * scales[:, None, None]
            products = stack @ scaled if places[0] % 2 else scaled @ stack
            for place, grad in zip(places, products.unbind(), strict=True):
                grads[place] = grad
        return tuple(grads)
