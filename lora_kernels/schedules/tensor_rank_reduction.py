"""Rank reduction: a model trains beside the decomposed one that it is to become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.decompose import Truncations, decomposable, numbers_of, parts_of, whole_ranks
from ..compress.factors import put
from ..optim._common import check_count, check_number
from .base import Schedule


class RankReducer(Schedule):
    """L(W) + (λ/2) Σ ‖W - TD_R(W)‖²; every epoch TD_R is taken anew, and R falls while it loses little

    Dual-model training with adaptive rank reduction (TNNLS 2023, "Deep Learning Model Compression With Rank
    Reduction in Tensor Decomposition"), in a reading of its abstract: the paper was not to be had. TD is the
    truncated SVD of a linear and Tucker-2 of a convolution without groups; ranks start whole. In each epoch
    each rank falls by the factor ``rate`` for as long as ‖W - TD‖² ≤ ε ‖W‖² (or, with ``evaluate``, for as
    long as the decomposed model scores within ``tolerance`` of the model), and no rank ever rises. Add
    :meth:`penalty` to the loss, or call :meth:`pull` after each backward pass; call :meth:`step` after each
    step, and :meth:`export` in the end.

    Args:
        model: a plain model; all its linears and convolutions are decomposed but for those left out.
        every: steps of an epoch.
        lam: λ.
        eps: ε.
        rate: c in (0, 1), by which ranks fall; by at least one.
        exclude: dotted names of layers to leave out.
        evaluate: a score of the model as it is, higher being better, in place of ε.
        tolerance: by how much the decomposed model may score less.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, or there is nothing to decompose.
    """

    key = "tensor_rank_reduction"
    saved = ("ranks", "targets")

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        lam: float = 1e-3,
        eps: float = 0.05,
        rate: float = 0.9,
        exclude: tuple[str, ...] = (),
        evaluate: Callable[[], float] | None = None,
        tolerance: float = 0.0,
    ) -> None:
        super().__init__(model)
        check_count("every", every)
        check_number("lam", lam)
        check_number("eps", eps)
        check_number("rate", rate, 0.0, 1.0, above=True)
        check_number("tolerance", tolerance)
        self.layers = decomposable(model, exclude)
        self.every, self.lam, self.eps, self.rate = every, lam, eps, rate
        self.evaluate, self.tolerance = evaluate, tolerance
        self.ranks = {name: whole_ranks(layer.weight) for name, layer in self.layers.items()}
        # TD_R of the weights, of the last epoch; ranks start whole.
        self.targets = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    def penalty(self) -> Tensor:
        """(λ/2) Σ ‖W - TD_R(W)‖², TD_R of the last epoch and without gradient."""
        weights = [layer.weight for layer in self.layers.values()]
        pulled: Tensor = _Pull.apply(self.lam, [self.targets[name] for name in self.layers], *weights)
        return pulled

    @torch.no_grad()
    def pull(self) -> None:
        """W's gradient ← it + λ (W - TD_R(W)): what :meth:`penalty` in the loss does, in fewer passes.

        Call it between ``backward`` and the optimiser's step, in place of the penalty.
        """
        for name, layer in self.layers.items():
            weight, target = layer.weight, self.targets[name]
            if weight.grad is None:
                weight.grad = (weight - target).mul_(self.lam)
            else:  # one weight after the other, which then stays in cache
                weight.grad.add_(weight, alpha=self.lam).sub_(target, alpha=self.lam)

    def act(self, step: int) -> None:
        """The end of an epoch, where it is one."""
        if step % self.every == 0:
            lower = self._lower_by_score if self.evaluate else self._lower_by_error
            self.targets = lower()

    @torch.no_grad()
    def export(self) -> nn.Module:
        """The decomposed model, in place: two factors for a linear, three convolutions for a convolution.

        A layer whose parts would be more numbers than it has stays as it is.
        """
        for name, layer in self.layers.items():
            ranks, weight = self.ranks[name], layer.weight
            if numbers_of(weight, ranks) < weight.numel():
                put(self.model, name, parts_of(layer, ranks))
        return self.model

    def _lower_by_error(self) -> dict[str, Tensor]:
        """The ranks fall while ε allows it; TD_R at those."""
        return {name: self._lowered(name, layer.weight) for name, layer in self.layers.items()}

    def _lowered(self, name: str, weight: Tensor) -> Tensor:
        parts, limit = Truncations(weight), self.eps * float(weight.square().sum())
        while (lower := self._fallen(self.ranks[name])) != self.ranks[name] and parts.error(lower) <= limit:
            self.ranks[name] = lower
        return parts.at(self.ranks[name])

    def _lower_by_score(self) -> dict[str, Tensor]:
        """One fall of all ranks, taken back layer by layer where the score suffers; TD_R at what remains."""
        assert self.evaluate is not None
        least = float(self.evaluate()) - self.tolerance
        parts = {name: Truncations(layer.weight.clone()) for name, layer in self.layers.items()}
        targets = {name: one.at(self.ranks[name]) for name, one in parts.items()}
        for name, one in parts.items():
            lower = self._fallen(self.ranks[name])
            tried = {**targets, name: one.at(lower)}
            with self._holding(tried):
                score = float(self.evaluate())
            if score >= least:
                self.ranks[name], targets = lower, tried
        return targets

    def _fallen(self, ranks: list[int]) -> list[int]:
        return [max(1, min(rank - 1, int(self.rate * rank))) for rank in ranks]

    @contextmanager
    def _holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the layers have these weights."""
        before = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.weight.copy_(weights[name])
            yield
        finally:
            for name, layer in self.layers.items():
                layer.weight.copy_(before[name])


class _Pull(torch.autograd.Function):
    """(λ/2) Σ ‖W - T‖², whose gradient in W is λ (W - T): made in the forward pass, while both are at hand"""

    @staticmethod
    def forward(ctx: Any, lam: float, targets: list[Tensor], *weights: Tensor) -> Tensor:
        gaps = torch._foreach_sub(weights, targets)
        norms = torch.stack(torch._foreach_norm(gaps))
        ctx.lam = lam
        ctx.save_for_backward(*gaps)
        return 0.5 * lam * norms.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return None, None, *torch._foreach_mul(ctx.saved_tensors, ctx.lam * dy)
