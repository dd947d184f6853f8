"""LoRA-FA: the down-projection stays as it was drawn."""

from __future__ import annotations

from ..base import register
from ..lora import LoRA


@register("lora_fa")
class LoRAFA(LoRA):
    """ΔW = (α/r) · B A with A frozen

    LoRA-FA (Zhang et al., 2023, arXiv 2308.03303). Only B ``[out, r]`` trains, so the backward pass
    reads h = x Aᵀ and x is not saved.
    """

    any_start = True
    frozen = frozenset({"lora_A"})
