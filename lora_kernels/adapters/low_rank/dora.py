"""DoRA: the length of each row of the weight apart from its direction."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.low_rank_norm import low_rank_norm
from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("dora")
class DoRA(LoRA):
    """W′ = m ⊙ (W + (α/r) · B A) / ‖W + (α/r) · B A‖, the norm by row

    DoRA (Liu et al., 2024, arXiv 2402.09353), also ``LoRAConfig(use_dora=True)``. A, B and the magnitude
    m ``[out]`` train; m starts at the norms, so that W′ starts at W. For the gradients the norm is a
    constant. ``delta()`` is (α/r) · B A, the change of direction alone; ``merged()`` is W′.
    """

    any_start = True
    plain = False
    over_quantized = False  # the norms are those of a dense weight
    splits = {}  # noqa: RUF012

    def build(self, site: Site) -> Start:
        """LoRA's A and B, and the row norms of the weight + ΔW; ones where there is no weight."""
        tensors, rest = super().build(site)
        weight = site.weight if rest is None else rest
        if weight is None:
            magnitude = torch.ones_like(tensors["lora_B"][:, 0])
        else:
            magnitude = low_rank_norm(weight, tensors["lora_A"], tensors["lora_B"], self.scaling)
        return Start({**tensors, "lora_magnitude_vector": magnitude}, rest)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A and B with the magnitude."""
        magnitude = self.lora_magnitude_vector
        return LowRank(self.lora_A, self.lora_B, self.scaling, magnitude=magnitude)
