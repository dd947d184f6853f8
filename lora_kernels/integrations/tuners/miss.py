"""MiSS (Kang and Yin, 2024, arXiv 2409.15371): LoRA whose A is fixed, and adds up every r-th feature."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.miss.layer import MissLinear
from torch import Tensor

from ...adapters.update import Branched, Dense, LowRank
from ...ops.folded_square import FoldedColumns
from .base import FusedTuner, dropout_now, linear


class FusedMiss(FusedTuner, MissLinear):
    """y = x Wᵀ + b + drop(x) Aᵀ D with A = [I I …].

    Of the form ``bat`` y = x (W + ΔW)ᵀ + b, where ΔW is W D + D by blocks and nothing is dropped.
    """

    per_adapter = "miss_block"
    dropouts = "miss_dropout"

    def why_not_adapter(self: Any, name: str) -> str | None:
        """One ``bat`` changes the W that the next one reads."""
        if self.miss_fn != "bat" or len(self.active_adapters) == 1:
            return None
        return "several adapters are active, each on what the last made of W"

    def update(self: Any, name: str, x: Tensor) -> LowRank | Branched | Dense:
        """Sums of x, or where it drops a product with A, which drops as it runs."""
        block = self.miss_block[name]
        if self.miss_fn == "bat":
            return Dense(_delta(self.base_layer.weight, block))
        if self.miss_fn == "mini":
            block = block.repeat(1, self.out_features // block.shape[1])
        if not dropout_now(self, name):
            return Branched(FoldedColumns(self.out_features), (block,))
        eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
        wide = eye.repeat(1, -(-self.in_features // len(block)))
        return LowRank(wide[:, : self.in_features], block.T)


def _delta(weight: Tensor, blocks: Tensor) -> Tensor:
    """W_oi D_o + D_o for each r × r block (o, i) of W."""
    count, r, _ = blocks.shape
    rows = weight.to(blocks.dtype).reshape(count, -1, r)
    return (rows @ blocks).view(count, r, -1, r).add(blocks[:, :, None]).view(weight.shape)


TAKEOVERS = {MissLinear: linear(FusedMiss)}
