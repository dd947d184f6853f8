"""AutoLoRA: ranks by gates that learn from the validation loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..optim._common import check_number
from .bilora import BiLoRA

RULES = ("softmax", "raw")


class AutoLoRA(BiLoRA):
    """a ← Adam(a, ∇_a L_val(V - ξ ∇_V L_tr, a)); then k = #{j : softmax(a)_j ≥ 1/r} ranks of a layer

    AutoLoRA (Zhang et al., 2024, arXiv 2403.09113), on adapters of ``LoRAConfig(method="bilora",
    method_options={"values": "softmax"})``. After the search train a new LoRA with
    ``rank_pattern=search.rank_pattern()`` on all samples. The paper's rule keeps few ranks; its code's keeps
    those with a_j / Σ a ≥ 1/r: ``"raw"``, for which a starts at 1.

    Args:
        model: one of :func:`apply_lora` with such adapters.
        loss: the loss of a batch, ``loss(batch)``.
        train: gives batches to train on, without end.
        validation: gives batches to validate on, without end.
        unroll: ξ, the learning rate of A and B.
        lr: of a.
        radius: of the finite difference.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, or the model has no such adapters with softmax.
    """

    key = "autolora_rank"

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        train: Iterator[Any],
        validation: Iterator[Any],
        *,
        unroll: float = 3e-4,
        lr: float = 3e-4,
        radius: float = 0.01,
    ) -> None:
        check_number("unroll", unroll)
        options: dict[str, Any] = {"lr": lr, "betas": (0.5, 0.999), "radius": radius, "unroll": unroll}
        super().__init__(model, loss, train, validation, **options)
        for name, one in self.adapters.items():
            if one.kind != "softmax":
                raise ValueError(f"model: {name}: expected method_options values='softmax', got {one.kind!r}")
        for one in self.adapters.values():
            one.values.data.fill_(1.0)

    def ranks(self, rule: str = "softmax") -> dict[str, int]:
        """Name of each layer -> how many ranks it keeps, at least one.

        Raises:
            ValueError: no such rule.
        """
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
        return {name: select_rank(one.values.detach(), rule) for name, one in self.adapters.items()}

    def rank_pattern(self, rule: str = "softmax") -> dict[str, int]:
        """:meth:`ranks` for ``LoRAConfig(rank_pattern=…)``."""
        return {re.escape(name): rank for name, rank in self.ranks(rule).items()}


def select_rank(values: Tensor, rule: str = "softmax") -> int:
    """#{j : softmax(a)_j ≥ 1/r}, or of a_j / Σ a for ``"raw"``; at least 1."""
    share = values.softmax(0) if rule == "softmax" else values / values.sum()
    # Equal shares are 1/r but for rounding.
    return max(1, int((share * len(values) >= 1 - 1e-6).sum()))
