"""BiLoRA: singular values learn from other samples than the vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..optim._common import check_number
from ._common import active_of
from .base import Schedule

Loss = Callable[[], Tensor]


def hypergradient(
    lower: Loss,
    upper: Loss,
    weights: Sequence[nn.Parameter],
    values: Sequence[nn.Parameter],
    *,
    radius: float = 0.01,
    unroll: float | None = None,
) -> list[Tensor]:
    """g = ∇_e L₂(V) - (∇_e L₁(V + ε v) - ∇_e L₁(V - ε v)) / 2ε, v = ∇_V L₂(V), ε = R / ‖v‖

    By finite differences (DARTS, Liu et al., 2018, arXiv 1806.09055): no second derivative. Without
    ``unroll`` V is where it is, a step of the lower level behind it, and the difference has no factor, as in
    the Betty library. With ``unroll`` = ξ L₂ is taken at V' = V - ξ ∇_V L₁(V), and ξ is the factor: the
    gradient of L₂(V'(e), e) to O(ε²). V is as before afterwards, bit for bit.

    Args:
        lower: L₁; each call has to use the same samples.
        upper: L₂.
        weights: V, which get no ``.grad``.
        values: e.
        radius: R.
        unroll: ξ.

    Examples:
        >>> v, e = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        >>> [g] = hypergradient(lambda: (v * e).sum(), lambda: (v * v * e).sum(), [v], [e])
    """
    kept = [weight.detach().clone() for weight in weights]
    if unroll is not None:
        _shift_(weights, kept, torch.autograd.grad(lower(), weights), -unroll)
    grads = torch.autograd.grad(upper(), [*weights, *values], allow_unused=True)
    v = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=False)]
    own = [
        torch.zeros_like(e) if g is None else g for e, g in zip(values, grads[len(weights) :], strict=True)
    ]
    norm = torch.linalg.vector_norm(torch.stack([one.norm() for one in v]))
    if norm == 0:
        _shift_(weights, kept)
        return own
    epsilon = float(radius / norm)
    sides = []
    for sign in (1, -1):
        _shift_(weights, kept, v, sign * epsilon)
        sides.append(torch.autograd.grad(lower(), values))
    _shift_(weights, kept)
    factor = (1.0 if unroll is None else unroll) / (2 * epsilon)
    return [g - factor * (up - down) for g, up, down in zip(own, *sides, strict=True)]


@torch.no_grad()
def _shift_(
    weights: Sequence[Tensor], kept: Sequence[Tensor], by: Sequence[Tensor] | None = None, factor: float = 0.0
) -> None:
    for i, (weight, value) in enumerate(zip(weights, kept, strict=True)):
        weight.copy_(value if by is None else value + factor * by[i])


class BiLoRA(Schedule):
    """e ← Adam(e, hypergradient) after each step of A and B, on samples of its own

    BiLoRA (Qin et al., 2024, arXiv 2403.13037), on adapters of ``LoRAConfig(method="bilora")``. The
    optimiser of the loop trains A and B on one part of the data (add :func:`orthogonality` to that loss);
    this trains e on the other. Outside of its steps e is frozen.

    Args:
        model: one of :func:`apply_lora` with such adapters.
        loss: the loss of a batch, ``loss(batch)``.
        lower: gives batches of the first part, without end: the optimiser's own do.
        upper: gives batches of the second part, without end.
        lr: of Adam.
        betas: of Adam.
        radius: R of :func:`hypergradient`.
        unroll: ξ of :func:`hypergradient`.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, or the model has no such adapters.
    """

    key = "bilora"
    saved = ("value_optimizer",)

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        lower: Iterator[Any],
        upper: Iterator[Any],
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        radius: float = 0.01,
        unroll: float | None = None,
    ) -> None:
        super().__init__(model)
        check_number("radius", radius, above=True)
        check_number("lr", lr)
        self.adapters = active_of(model, "bilora")
        self.loss, self.lower, self.upper, self.radius, self.unroll = loss, lower, upper, radius, unroll
        self.value_optimizer = torch.optim.Adam([one.values for one in self.adapters.values()], lr, betas)
        self._freeze()

    def act(self, step: int) -> None:
        """One step of e."""
        samples, others = next(self.lower), next(self.upper)
        values = [one.values for one in self.adapters.values()]
        weights = [
            factor
            for one in self.adapters.values()
            for factor in (one.lora_A, one.lora_B)
            if factor.requires_grad
        ]
        for one in values:
            one.requires_grad_(True)
        try:
            with torch.enable_grad():
                sides = (lambda: self.loss(samples)), (lambda: self.loss(others))
                grads = hypergradient(*sides, weights, values, radius=self.radius, unroll=self.unroll)
        finally:
            self._freeze()
        for one, grad in zip(values, grads, strict=True):
            one.grad = grad
        self.value_optimizer.step()
        self.value_optimizer.zero_grad()

    def _freeze(self) -> None:
        for one in self.adapters.values():
            one.values.requires_grad_(False)


def orthogonality(model: nn.Module) -> Tensor:
    """Σ ‖Bᵀ B - I‖² + ‖A Aᵀ - I‖² over the adapters of the method ``bilora``, for the lower loss.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="bilora")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> loss = 0.1 * orthogonality(model)
    """
    total = []
    for one in active_of(model, "bilora").values():
        unit = torch.eye(one.r, device=one.lora_A.device, dtype=one.lora_A.dtype)
        sides = (one.lora_B.T @ one.lora_B, one.lora_A @ one.lora_A.T)
        total += [(side - unit).square().sum() for side in sides]
    return torch.stack(total).sum()
