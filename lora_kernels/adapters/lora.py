"""LoRA and rsLoRA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..init import draw
from .base import Adapter, make, register
from .call import Call
from .config import LoRAConfig
from .site import Site, Start
from .update import LowRank


@register("lora")
class LoRA(Adapter):
    """ΔW = (α/r) · B A

    LoRA (Hu et al., 2021, arXiv 2106.09685); with ``use_rslora`` the scale is α/√r (Kalajdzievski, 2023,
    arXiv 2312.03732). A ``[r, in]`` and B ``[out, r]`` train, but for what the initialiser freezes; how they
    start says ``init_lora_weights``. Where that takes s · B A out of W, ``start_A`` and ``start_B`` keep what
    it took, so that the adapter can be saved as one of W.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    peft = True
    any_start = True
    splits = {"lora_A": ("in", 1), "lora_B": ("out", 0)}  # noqa: RUF012

    def build(self, site: Site) -> Start:
        """What the initialiser draws."""
        drawn = draw(site)
        frozen = type(self).frozen | drawn.frozen
        if frozen >= {"lora_A", "lora_B"} and not type(self).frozen >= {"lora_A", "lora_B"}:
            init = site.config.init_lora_weights
            raise ValueError(
                f"init_lora_weights: {self.method} expects a start of which a factor trains, got {init!r}"
            )
        self.frozen = frozen
        if drawn.taken:
            for name, factor in (("start_A", drawn.lora_a), ("start_B", drawn.lora_b)):
                self.register_buffer(name, factor.to(device=site.device, dtype=site.dtype, copy=True))
        return Start({"lora_A": drawn.lora_a, "lora_B": drawn.lora_b}, drawn.weight)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A, B and the scale."""
        own = self._parameters
        if "lora_A" in own and "lora_B" in own:  # past a module's search, which shows at small sizes
            return LowRank(own["lora_A"], own["lora_B"], self.scaling)  # type: ignore[arg-type]
        return LowRank(self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def as_lora(self, lora_a: Tensor, lora_b: Tensor) -> Adapter:
        """The LoRA of ΔW = s · B A for another A ``[rank, in]`` and B ``[out, rank]``, with this one's s."""
        r = lora_a.shape[0]
        config = LoRAConfig(r=r, lora_alpha=self.scaling * r, lora_dropout=self.lora_dropout)
        small = make(self.in_features, self.out_features, config, device=lora_a.device, dtype=lora_a.dtype)
        small.lora_A.copy_(lora_a)
        small.lora_B.copy_(lora_b)
        return small
