"""What LoHa and LoKr share: their dropouts, of rows of ΔW and of the whole of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import FusedTuner


class FusedLycoris(FusedTuner):
    """A linear of PEFT's ``LycorisLayer``."""

    per_adapter = "scaling"

    def why_not_adapter(self: Any, name: str) -> str | None:
        """Module dropout leaves out the adapter, which no update says."""
        p = self.module_dropout[name]
        return f"adapter {name!r} has module_dropout" if p else None

    def kept_rows(self: Any, name: str) -> Tensor | None:
        """Rank dropout's factor of each row of ΔW in this call, drawn as PEFT draws it, or ``None``."""
        p = self.rank_dropout[name]
        if not self.training or not p:
            return None
        torch.rand(1)  # PEFT's draw for module dropout
        kept = (torch.rand(self.out_features) > p).float()
        kept = kept / kept.mean() if self.rank_dropout_scale.get(name, True) else kept
        return kept.to(self.base_layer.weight.device)
