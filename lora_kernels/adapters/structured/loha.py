"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..peft_form import PeftForm
from ..site import Site, Start
from ..update import Dense, LowRank


@register("loha")
class LoHa(Adapter):
    """ΔW = (α/r) · (B₁ A₁) ⊙ (B₂ A₂)

    LoHa (Hyeon-Woo et al., 2021, arXiv 2108.06098, as FedPara; LyCORIS, Yeh et al., 2023, arXiv 2309.14859).
    B ``[out, r]`` and A ``[r, in · kernel]`` train, ``hada_w1_a``, ``hada_w1_b`` and so on as LyCORIS and
    PEFT call them; B₂ starts at zero (``init_lora_weights=False``: random). ΔW has rank r²: while 4 r² is at
    most the smaller side, it is one LoRA of that rank, whose factors are the products of all pairs of ranks,
    and serves wherever LoRA does; beyond, ΔW is formed.
    """

    peft_form = PeftForm(
        "LOHA",
        {"alpha": "lora_alpha"},
        constants={"use_effective_conv2d": False},
        unread=frozenset({"init_weights"}),
    )

    def build(self, site: Site) -> Start:
        """Both pairs."""
        self.plain = 4 * self.r**2 <= min(site.in_features, site.out_features)  # type: ignore[misc]
        zero = site.config.init_lora_weights is not False
        make = site.zeros if zero else site.kaiming
        down, up = (self.r, site.in_features), (site.out_features, self.r)
        one = {"hada_w1_a": site.kaiming(*up), "hada_w1_b": site.kaiming(*down)}
        return Start({**one, "hada_w2_a": make(*up), "hada_w2_b": site.kaiming(*down)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank | Dense:
        """Factors of rank r² for small r, else ΔW."""
        w1_a, w1_b, w2_a, w2_b = self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        if not self.plain:
            return Dense(self.scaling * (w1_a @ w1_b) * (w2_a @ w2_b))
        lora_a = (w1_b[:, None] * w2_b).flatten(0, 1)
        return LowRank(lora_a, (w1_a[:, :, None] * w2_a[:, None]).flatten(1), self.scaling)
