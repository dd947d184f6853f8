"""LoNAS: elastic LoRA, of which any smaller one is a view."""

from __future__ import annotations

from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("lonas")
class LoNAS(LoRA):
    """ΔW = (α/r) · B[:, :ρ] A[:ρ], and of a narrower layer B[:o, :ρ] A[:ρ, :i]

    LoNAS (Muñoz et al., LREC-COLING 2024). The scale is that of the whole rank, whatever ρ is.
    ``method_options={"ranks": [...]}`` are the ρ to choose from (r and its halves down to 1).
    :meth:`set_rank` chooses one; :func:`lora_kernels.nn.elastic` narrows whole layers, W too. Draw a choice
    anew at each step. All are views: a change copies nothing.
    """

    options = frozenset({"ranks"})

    def build(self, site: Site) -> Start:
        """LoRA's."""
        halves = [self.r >> shift for shift in range(self.r.bit_length())]
        self.ranks = tuple(site.option("ranks", halves))
        if not self.ranks or any(rank not in range(1, self.r + 1) for rank in self.ranks):
            raise ValueError(f"method_options: ranks: expected ranks of 1 to {self.r}, got {self.ranks}")
        self.rank = self.r
        return super().build(site)

    def set_rank(self, rank: int) -> None:
        """Makes ρ = ``rank`` the active one.

        Raises:
            ValueError: it is not in 1..r.
        """
        if not 1 <= rank <= self.r:
            raise ValueError(f"rank: expected one of 1 to {self.r}, got {rank}")
        self.rank = rank

    def take_settings(self, other: Adapter) -> None:
        """As of :class:`Adapter`; the rank in use stays."""
        rank = self.rank
        super().take_settings(other)
        self.set_rank(rank)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """The first ρ ranks."""
        return LowRank(self.lora_A[: self.rank], self.lora_B[:, : self.rank], self.scaling)
