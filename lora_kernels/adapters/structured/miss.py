"""MiSS: LoRA whose A is fixed, and adds up every r-th feature."""

from __future__ import annotations

from torch import Tensor

from ...ops.folded_square import fold
from ..base import Adapter, register
from ..call import Call
from ..peft_form import PeftForm
from ..site import Site, Start
from ..update import LowRank


@register("miss")
class MiSS(Adapter):
    """ΔW[:, j] = D[j mod r]ᵀ

    MiSS (Kang and Yin, 2024, arXiv 2409.15371), PEFT's default form of it: D ``[r, out]``, called
    ``miss_block`` as there, trains from zero (``init_lora_weights=False``: random); x is folded to the sums
    of every r-th feature, MoRA's fold without its wrap, and multiplied by D. No scale; α is not used. Of x
    only the ``[tokens, r]`` sums are saved.

    Raises:
        ValueError: r exceeds ``in_features``.
    """

    plain = False
    reads_x = True
    peft_form = PeftForm(
        "MISS",
        {"miss_dropout": "lora_dropout"},
        constants={"init_weights": True},
        unread=frozenset({"mini_r"}),
    )
    miss_block: Tensor

    def build(self, site: Site) -> Start:
        """D."""
        if self.r > site.in_features:
            raise ValueError(f"r: miss expects at most in_features = {site.in_features}, got {self.r}")
        zero = site.config.init_lora_weights is not False
        make = site.zeros if zero else site.kaiming
        return Start({"miss_block": make(self.r, site.out_features)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """The sums in the place of A x."""
        return LowRank(None, self.miss_block.T, x_lora=fold(self.drop(x), self.r))
