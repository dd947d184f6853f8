"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

from torch import Tensor

from ...ops.formed_linear import HadamardProduct
from ..base import Adapter, register
from ..call import Call
from ..peft_form import PeftForm
from ..site import Site, Start
from ..update import Dense, Formed, LowRank, delta_of


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
        self.plain = _is_low_rank(self.r, site.in_features, site.out_features)  # type: ignore[misc]
        zero = site.config.init_lora_weights is not False
        make = site.zeros if zero else site.kaiming
        down, up = (self.r, site.in_features), (site.out_features, self.r)
        one = {"hada_w1_a": site.kaiming(*up), "hada_w1_b": site.kaiming(*down)}
        return Start({**one, "hada_w2_a": make(*up), "hada_w2_b": site.kaiming(*down)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank | Formed | Dense:
        """Factors of rank r² for small r, else W + ΔW of a linear, or ΔW."""
        factors = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        update = hadamard(*factors, self.scaling)
        of_linear = x is not None and not self.kernel
        return update if of_linear or isinstance(update, LowRank) else Dense(delta_of(update))


def hadamard(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, scaling: float) -> LowRank | Formed:
    """ΔW = s · (B₁ A₁) ⊙ (B₂ A₂), as one LoRA of rank r² where that is small."""
    if not _is_low_rank(b1.shape[1], b1.shape[0], a1.shape[1]):
        return Formed(HadamardProduct(scaling), (b1, a1, b2, a2))
    lora_b = (b1[:, :, None] * b2[:, None]).flatten(1)
    return LowRank((a1[:, None] * a2).flatten(0, 1), lora_b, scaling)


def _is_low_rank(rank: int, *sides: int) -> bool:
    return 4 * rank**2 <= min(sides)
