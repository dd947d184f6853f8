"""LoFiT: scales, then offsets, of the outputs of attention heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import Input

_STD = 1e-3


@register("lofit")
class LoFiT(Adapter):
    """y = ((1 + a) ⊙ x + v) Wᵀ + b, W the projection behind attention and x its heads side by side

    LoFiT (Yin et al., 2024, arXiv 2406.01563), in two stages, ``method_options={"stage": ...}``:

    - "scale": a ``[in]`` trains, v = 0; the paper adds λ·Σ|a| to the loss, λ = 5e-4.
      :func:`lora_kernels.nn.lofit_heads` then names the heads of largest ‖a‖.
    - "offset" (the default): v ``[chosen, in/heads]`` trains on these, a = 0. ``chosen`` is the name of each
      layer → its heads (all, where it is not given): what ``lofit_heads`` gives, and ``target_modules`` too.

    ``heads`` is how many there are (1). Both start at N(0, 10⁻⁶). It reads its input; no one weight holds an
    offset, and :meth:`folded` gives W and b of either stage. Rank and alpha say nothing here.
    """

    options = frozenset({"stage", "heads", "chosen"})
    plain, reads_x, mergeable, zero_start = False, True, False, False

    def build(self, site: Site) -> Start:
        """Small normal scales or offsets."""
        stage = site.option("stage", "offset", ("scale", "offset"))
        self.heads = site.whole_option("heads", 1)
        site.must_divide("heads", self.heads, "in_features")
        self.chosen = self._chosen_here(site)
        if stage == "scale":
            return Start({"scale": site.normal(site.in_features, std=_STD)})
        width = site.in_features // self.heads
        return Start({"offset": site.normal(len(self.chosen), width, std=_STD)})

    def _chosen_here(self, site: Site) -> list[int]:
        every = site.option("chosen", {})
        if not isinstance(every, Mapping):
            raise TypeError(
                f"method_options: chosen: expected layers and their heads, got {type(every).__name__}"
            )
        chosen = list(every.get(site.name, ())) if every else list(range(self.heads))
        if (
            not chosen
            or any(head not in range(self.heads) for head in chosen)
            or len({*chosen}) < len(chosen)
        ):
            raise ValueError(
                f"method_options: chosen: expected some of {self.heads} heads for {site.name!r}, got {chosen}"
            )
        return chosen

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Input:
        """x as the base then reads it."""
        assert x is not None
        if hasattr(self, "scale"):
            return Input(x * (1 + self.scale).to(x.dtype))
        return Input(x + self._vector().to(x.dtype))

    def _vector(self) -> Tensor:
        """v ``[in]``, 0 for the heads that were not chosen."""
        index = torch.tensor(self.chosen, device=self.offset.device)
        whole = self.offset.new_zeros(self.heads, self.offset.shape[1])
        return whole.index_copy(0, index, self.offset).flatten()

    @torch.no_grad()
    def folded(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W diag(1 + a) and b, or W and b + W v: a linear of the same function."""
        if hasattr(self, "scale"):
            return weight * (1 + self.scale).to(weight.dtype), bias
        added = weight @ self._vector().to(weight.dtype)
        return weight, added if bias is None else bias + added
