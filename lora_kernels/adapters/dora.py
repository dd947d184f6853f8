"""DoRA: the length of each row of the weight apart from its direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.low_rank_norm import low_rank_norm
from .base import Adapter, Factors, register
from .config import LoRAConfig


@register("dora")
class DoRA(Adapter):
    """W′ = m ⊙ (W + (α/r) · B A) / ‖W + (α/r) · B A‖, the norm by row

    DoRA (Liu et al., 2024, arXiv 2402.09353), also ``LoRAConfig(use_dora=True)``. A, B and the magnitude
    m ``[out]`` train; m starts at the norms, so that W′ starts at W. For the gradients the norm is a
    constant. ``delta()`` is (α/r) · B A, the change of direction alone; ``merged()`` is W′.
    """

    def build(self, config: LoRAConfig, **where: Any) -> None:
        """Creates A, B and the magnitude."""
        super().build(config, **where)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features, **where))

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """LoRA's A and B, and the row norms of ``weight`` + ΔW; ones where there is no weight."""
        super().reset_parameters(weight)
        if weight is None:
            nn.init.ones_(self.lora_magnitude_vector)
        else:
            norms = low_rank_norm(weight, self.lora_A, self.lora_B, self.scaling)
            self.lora_magnitude_vector.copy_(norms)

    def lower(self) -> Factors:
        """A and B with the magnitude."""
        return Factors(self.lora_A, self.lora_B, self.scaling, None, self.lora_magnitude_vector)
