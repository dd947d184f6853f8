"""What the structures here share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ops.branched_linear import Branch
from ..base import Adapter
from ..update import Branched


class Structured(Adapter):
    """A method that lowers to a branch with an op of its own."""

    plain = False
    reads_x = True

    def branched(self, x: Any, branch: Branch, *tensors: Tensor) -> Branched:
        """The update for x, which the branch alone drops."""
        drops = self.training and self.lora_dropout > 0
        return Branched(branch, tensors, self.drop(x) if drops else None)
