"""Delta-LoRA's beginning: from its K-th step on W follows the adapters."""

from __future__ import annotations

from torch import nn

from ..adapters.low_rank.delta_lora import DeltaLoRA as Adapter
from ..nn.adapter_layer import AdapterLayer
from ..optim._common import check_number
from .base import Schedule


class DeltaLoRA(Schedule):
    """W_eff = W + s · B A up to step K, then W + s · ((1+λ) B A - λ B_K A_K)

    Delta-LoRA (Zi et al., 2023, arXiv 2309.02411) on adapters of ``LoRAConfig(method="delta_lora")``, which
    say how. The paper's W takes λ s (B⁺A⁺ - B A) with each step after the K-th; that sums up to this, and
    nothing has to be done at a step but at the K-th.

    Args:
        model: one of :func:`apply_lora` with adapters of that method.
        lam: λ.
        start_step: K; 0 for the very start.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, the model has no such adapters, or they drop out.
    """

    key = "delta_lora"

    def __init__(self, model: nn.Module, *, lam: float = 2.0, start_step: int = 500) -> None:
        super().__init__(model)
        check_number("lam", lam)
        check_number("start_step", start_step)
        layers = [layer for layer in model.modules() if isinstance(layer, AdapterLayer)]
        active = [layer.adapters[name] for layer in layers for name in layer.active]
        self.adapters = [one for one in active if isinstance(one, Adapter)]
        if not self.adapters:
            raise ValueError("model: expected adapters of LoRAConfig(method='delta_lora'), got none")
        for one in self.adapters:
            if one.lora_dropout:  # the gradient of W would be another than that of s · B A
                raise ValueError(f"lora_dropout: expected 0, got {one.lora_dropout:g}")
        self.lam, self.start_step = lam, start_step
        self.act(0)

    def act(self, step: int) -> None:
        """Sets λ and the anchors, at the K-th step."""
        if step != self.start_step:
            return
        for one in self.adapters:
            one.anchor_A.data.copy_(one.lora_A)
            one.anchor_B.data.copy_(one.lora_B)
            one.lam.data.fill_(self.lam)
