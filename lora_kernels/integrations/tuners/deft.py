"""DeFT and PaRa: W's output in a subspace taken away, and something else put there."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.deft.layer import DeftLinear
from torch import Tensor

from ...adapters.update import LowRank, apply_updates
from ...ops._lora_function import rows_of
from .base import FusedTuner, base_of, dropped, linear


class _Turn(NamedTuple):
    """+ (drop(x) Rᵀ - x Wᵀ P) Qᵀ; PaRa has no R."""

    # P and Q [out, r], which PEFT makes in float32.
    taken: Tensor
    given: Tensor
    # R [r, in], scaled, and x after dropout where it drops.
    put: Tensor | None
    x: Tensor | None


class FusedDeft(FusedTuner, DeftLinear):
    """y = x Wᵀ + b + (s · drop(x) Rᵀ - x Wᵀ P) Qᵀ: of many rows a LoRA of A = s R - Pᵀ W and B = Q

    Of few, whose product with P takes less than W's, as PEFT, with one product by Q and fewer passes over y.
    """

    per_adapter = "deft_P"
    dropouts = "deft_dropout"

    def update(self: Any, name: str, x: Tensor) -> _Turn:  # type: ignore[override]
        """Both ways begin with it."""
        given, taken = self._project(self.deft_P[name], name)
        if name not in self.deft_R:
            return _Turn(taken, given, None, None)
        return _Turn(taken, given, self.deft_R[name] * self.deft_scaling[name], dropped(self, name, x))

    def computed(self: Any, names: list[str], x: Tensor, read: dict[str, Any]) -> Tensor:
        """y with what each adapter takes and puts."""
        turns = [self.update(name, x) for name in names]
        weight, bias = base_of(self)
        if _is_few(x, weight):
            return _by_rows(x, weight, bias, turns)
        updates = [_low_rank(x, weight, turn) for turn in turns]
        return apply_updates(x, weight, bias, updates, [0.0] * len(updates))


def _is_few(x: Tensor, weight: Tensor) -> bool:
    """Counted, Pᵀ W pays from two thirds of W's width in rows on; measured, from a fifth: the other way's
    thin products are more, and it passes over y once more.
    """
    return math.prod(x.shape[:-1]) * 5 < weight.shape[1]


def _low_rank(x: Tensor, weight: Tensor, turn: _Turn) -> LowRank:
    lora_a = -turn.taken.T.to(weight.dtype) @ weight
    if turn.x is not None:
        assert turn.put is not None
        return LowRank(None, turn.given, x_lora=F.linear(turn.x, turn.put) + F.linear(x, lora_a))
    return LowRank(lora_a if turn.put is None else lora_a + turn.put, turn.given)


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, turns: list[_Turn]) -> Tensor:
    """In float32 at least, as PEFT; b, which nobody takes, comes back in as b P."""
    base: Any = rows_of(F.linear(x, weight, bias))
    wide = torch.promote_types(base.dtype, torch.float32)
    base = y = base.to(wide)
    for taken, given, put, d in turns:
        h = base @ -taken.to(wide)
        if bias is not None:
            h = h + bias.to(wide) @ taken.to(wide)
        if put is not None:
            h = h + F.linear(rows_of(x if d is None else d).to(wide), put.to(wide))  # type: ignore[union-attr]
        y = torch.addmm(y, h, given.T.to(wide))
    return y.view(*x.shape[:-1], y.shape[-1])


TAKEOVERS = {DeftLinear: linear(FusedDeft)}
