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
        enabled = tuple(site.option("enable_lora", (True, False, True)))
        if any(not isinstance(one, bool) for one in enabled) or not any(enabled):
            raise ValueError(
                f"method_options: enable_lora: expected a flag for each part, one of them set, got {enabled}"
            )
        site.must_divide("len(enable_lora)", len(enabled), "out_features")
        self.enabled, m = enabled, sum(enabled)
        rows = m * (site.out_features // len(enabled))
        return Start(
            {"merged_A": site.kaiming(self.r * m, site.in_features), "merged_B": site.zeros(rows, self.r)}
        )

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """B with the B_i on its diagonal, and zeros in the rows of the other parts."""
        parts = iter(torch.block_diag(*self.merged_B.chunk(sum(self.enabled))).chunk(sum(self.enabled)))
        rows = self.out_features // len(self.enabled)
        zeros = self.merged_B.new_zeros(rows, len(self.merged_A))
        lora_b = torch.cat([next(parts) if enabled else zeros for enabled in self.enabled])
        return LowRank(self.merged_A, lora_b, self.scaling)
