"""Bayesian-LoRA's structure: bits and ranks of LoRA's factors behind gates (over 60 lines: six tensors)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant.gated import BITS, gated_quantise, hard_gates, open_bits, rounded, sampled_gates
from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank

_STD, _OPEN = 0.02, 6.0
_FACTORS = ("lora_A", "lora_B", "lora_E")


@register("blora")
class BLoRA(LoRA):
    """ΔW = (α/r) · Q(B) diag(g ⊙ Q(E)) Q(A), g = (1, p₁, p₁p₂, …)

    Bayesian-LoRA (Meo et al., 2024, arXiv 2406.13046). What trains are A ``[r, in]``, B ``[out, r]``,
    E ``[r, 1]`` and the logits of Q's gates ``[3, 4]`` and of the ranks' ``[r]``, of which the first rank has
    none; Q is :func:`lora_kernels.quant.gated.gated_quantise`. A and B start at N(0, 0.02²) and E at N(0, 1),
    so ΔW does not start at zero. Gates are 0 or 1 but for training with ``noise``, uniform numbers that
    :class:`lora_kernels.schedules.BLoRA` draws; without ``quantising`` Q and g do nothing.
    ``method_options``: ``learn_ranges`` and ``clip`` of Q (False). W keeps its own format and activations
    theirs; the paper gates those too.
    """

    frozen = frozenset({"ranges"})
    options = frozenset({"learn_ranges", "clip"})
    zero_start = False
    peft = False
    splits = {}  # noqa: RUF012  (a range is of a whole factor)

    def build(self, site: Site) -> Start:
        """The factors, their ranges, and open gates."""
        self.quantising, self.noise = True, None
        self.clip = site.option("clip", False, (True, False))
        self.frozen = frozenset() if site.option("learn_ranges", False, (True, False)) else type(self).frozen
        a = site.normal(self.r, site.in_features, std=_STD)
        b = site.normal(site.out_features, self.r, std=_STD)
        start = {"lora_A": a, "lora_B": b, "lora_E": site.normal(self.r, 1)}
        ranges = torch.stack([one.abs().max() for one in start.values()])
        gates = {"bit_gates": site.zeros(3, len(BITS) - 1) + _OPEN, "rank_gates": site.zeros(self.r) + _OPEN}
        signed = torch.stack([one.min() < 0 for one in start.values()])
        return Start({**start, **gates, "ranges": ranges, "signed": signed})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """The quantised factors, and E behind the gates of the ranks."""
        if not self.quantising:
            return LowRank(self.lora_A, self.lora_B, self.scaling, self.lora_E[:, 0])
        noise = self.noise if self.training else None
        bits = _gates(self.bit_gates, noise, 0)
        a, b, e = (
            gated_quantise(getattr(self, name), self.ranges[i], self.signed[i], bits[i], clip=self.clip)
            for i, name in enumerate(_FACTORS)
        )
        return LowRank(a, b, self.scaling, e[:, 0] * self.rank_gate(noise))

    def rank_gate(self, noise: Tensor | None = None) -> Tensor:
        """g ``[r]``, of ones and then zeros."""
        nested = _gates(self.rank_gates[1:], noise, self.bit_gates.numel()).cumprod(0)
        return torch.cat([torch.ones_like(self.rank_gates[:1]), rounded(nested)])

    def bits(self) -> dict[str, int]:
        """Of each factor, how many bits its open gates leave."""
        return dict(zip(_FACTORS, open_bits(hard_gates(self.bit_gates.detach())).tolist(), strict=True))


def _gates(logits: Tensor, noise: Tensor | None, start: int) -> Tensor:
    if noise is None:
        return hard_gates(logits)
    return sampled_gates(logits, noise[start : start + logits.numel()].view_as(logits))
