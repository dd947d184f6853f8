"""DyLoRA: nested ranks, the active one chosen at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..lora import LoRA
from ..site import Site
from ..update import LowRank


@register("dylora")
class DyLoRA(LoRA):
    """ΔW = (α/b) · B[:, :b] A[:b] for the active rank b ≤ r

    DyLoRA (Valipour et al., 2022, arXiv 2210.07558). Draw b anew at each step with
    :meth:`sample_rank` and pass it to :meth:`set_rank`, one b for all layers; afterwards serve any b.
    A[:b] and B[:, :b] are views: a change of rank copies nothing.

    ``method_options={"frozen": True}`` trains row b alone: the rows before it get no gradient.
    """

    options = frozenset({"frozen"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.rank = self.r
        self.only_last = bool(site.option("frozen", False))

    def set_rank(self, b: int) -> None:
        """Makes b the active rank.

        Raises:
            ValueError: b is not in 1..r.
        """
        if not 1 <= b <= self.r:
            raise ValueError(f"b: expected a rank of 1 to {self.r}, got {b}")
        self.rank = b
        self.scaling = self.scaling_at(b)

    def sample_rank(self, generator: torch.Generator | None = None) -> int:
        """Uniform in 1..r; does not set it."""
        return int(torch.randint(1, self.r + 1, (), generator=generator))

    def compact(self) -> Adapter:
        """The LoRA of the active rank's ΔW that holds no more than that rank."""
        return self.as_lora(self.lora_A[: self.rank], self.lora_B[:, : self.rank])

    def take_settings(self, other: Adapter) -> None:
        """As of :class:`Adapter`; the rank in use stays."""
        rank = self.rank
        super().take_settings(other)
        self.set_rank(rank)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """The first b ranks."""
        b = self.rank
        lora_a, lora_b = self.lora_A[:b], self.lora_B[:, :b]
        if self.only_last and torch.is_grad_enabled() and b > 1:
            lora_a = torch.cat((lora_a[:-1].detach(), lora_a[-1:]))
            lora_b = torch.cat((lora_b[:, :-1].detach(), lora_b[:, -1:]), 1)
        return LowRank(lora_a, lora_b, self.scaling)
