"""PRILoRA: ranks that rise with depth, and an A pruned by what its columns read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..optim._common import check_count, check_number, pairs_of
from ._common import site_name
from .base import Schedule


def linear_ranks(layers: int, first: int = 4, last: int = 12) -> list[int]:
    """r_l = round(r_s + (r_f - r_s) · l / (L - 1)), for ``LoRAConfig(rank_pattern=…)``

    Raises:
        TypeError: a number is no int.
        ValueError: a number is below 1.

    Examples:
        >>> linear_ranks(5)
        [4, 6, 8, 10, 12]
    """
    for name, value in (("layers", layers), ("first", first), ("last", last)):
        check_count(name, value)
    return [round(first + (last - first) * i / max(layers - 1, 1)) for i in range(layers)]


class PRILoRA(Schedule):
    """n_j ← β n_j + (1-β) ‖X_:j‖₂; every K steps A_ij ← 0 for the ⌊p · in⌋ least |A_ij| n_j of each row

    PRILoRA (Benedek and Wolf, 2024, arXiv 2401.11316), with :func:`linear_ranks`. X are all rows that a layer
    read in training mode between two steps; a hook tells, and a layer with one is computed by itself, not in
    a group. What was pruned trains on and may come back. β, K, p and that rows are compared in themselves are
    from memory. Prune once more at the end with :meth:`prune`.

    Args:
        model: one of :func:`apply_lora` or of PEFT, with LoRA on linears.
        every: K.
        ratio: p, in [0, 1).
        beta: β, in [0, 1).

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, or the model has no LoRA layers, or on more than linears.
    """

    key = "prilora"
    saved = ("norms",)

    def __init__(self, model: nn.Module, *, every: int = 40, ratio: float = 0.5, beta: float = 0.9) -> None:
        super().__init__(model)
        check_count("every", every)
        check_number("ratio", ratio, 0.0, 1.0)
        check_number("beta", beta, 0.0, 1.0)
        self.pairs = pairs_of(model)
        for pair in self.pairs:
            if pair.is_embedding or pair.lora_a.dim() != 2:
                raise ValueError(f"model: {pair.name}: expected a linear, got {pair.base}")
        self.every, self.ratio, self.beta = every, ratio, beta
        self.norms = {site_name(pair): pair.lora_a.new_zeros(pair.lora_a.shape[1]) for pair in self.pairs}
        # Σ x² of each column since the last step.
        self._squares: dict[str, Tensor] = {}
        hooks = [(pair.layer, self._reader(site_name(pair))) for pair in self.pairs]
        self._handles = [layer.register_forward_pre_hook(hook) for layer, hook in hooks]

    def act(self, step: int) -> None:
        """Follows the norms, and prunes where it is time."""
        for name, squares in self._squares.items():
            beta = self.beta if self.norms[name].any() else 0.0
            self.norms[name] = beta * self.norms[name] + (1 - beta) * squares.sqrt()
        self._squares = {}
        if step % self.every == 0:
            self.prune()

    @torch.no_grad()
    def prune(self) -> None:
        """Zeroes the least of each row of A."""
        for pair in self.pairs:
            count = int(self.ratio * pair.lora_a.shape[1])
            scores = pair.lora_a.abs() * self.norms[site_name(pair)]
            pair.lora_a.scatter_(1, scores.topk(count, 1, largest=False).indices, 0.0)

    def close(self) -> None:
        """Stops listening to the layers."""
        for handle in self._handles:
            handle.remove()

    def _reader(self, name: str) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module.training and torch.is_grad_enabled():
                x = args[0].detach().to(self.norms[name].dtype).flatten(0, -2)
                squares = x.square().sum(0)
                before = self._squares.get(name)
                self._squares[name] = squares if before is None else before + squares

        return read
