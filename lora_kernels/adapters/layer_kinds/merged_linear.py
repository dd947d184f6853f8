"""loralib's MergedLinear: LoRA of some of the parts of one linear."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank


@register("merged_linear")
class MergedLinear(Adapter):
    """ΔW_i = (α/r) · B_i A_i for those of the n equal parts of W's rows that are enabled, 0 for the others

    LoRA of a linear that is query, key and value in one (Hu et al., 2021, arXiv 2106.09685; loralib's
    ``MergedLinear``). ``method_options={"enable_lora": [True, False, True]}``, the default, says which parts:
    m of n. ``merged_A`` ``[r·m, in]`` and ``merged_B`` ``[m·out/n, r]`` train.
    """

    options = frozenset({"enable_lora"})

    def build(self, site: Site) -> Start:
        """A Kaiming-uniform A, and a B of zeros."""
        self.enabled = enabled_parts(site, (True, False, True))
        m, rows = sum(self.enabled), site.out_features // len(self.enabled)
        return Start(
            {"merged_A": site.kaiming(self.r * m, site.in_features), "merged_B": site.zeros(m * rows, self.r)}
        )

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """B with the B_i on its diagonal, and zeros in the rows of the other parts."""
        return LowRank(self.merged_A, spread_parts(self.merged_B, self.enabled), self.scaling)


def enabled_parts(site: Site, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """The option ``enable_lora``: which of the n equal parts of W's rows have an update.

    Raises:
        ValueError: not a flag for each, none of them is set, or n does not divide ``out_features``.
    """
    enabled = tuple(site.option("enable_lora", default))
    if any(not isinstance(one, bool) for one in enabled) or not any(enabled):
        raise ValueError(
            f"method_options: enable_lora: expected a flag for each part, one of them set, got {enabled}"
        )
    site.must_divide("len(enable_lora)", len(enabled), "out_features")
    return enabled


def spread_parts(lora_b: Tensor, enabled: tuple[bool, ...]) -> Tensor:
    """The B_i of the m enabled parts ``[m·out/n, r]`` as one B ``[out, m·r]``, each over ranks of its own."""
    m = sum(enabled)
    parts = iter(torch.block_diag(*lora_b.chunk(m)).chunk(m))
    zeros = lora_b.new_zeros(lora_b.shape[0] // m, m * lora_b.shape[1])
    return torch.cat([next(parts) if one else zeros for one in enabled])
