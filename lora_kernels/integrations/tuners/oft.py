"""OFT (Qiu et al., 2023, arXiv 2306.07280; OFTv2: Qiu et al., 2025, arXiv 2506.19847): x turned by blocks."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.oft.layer import Linear
from torch import Tensor

from ...adapters.update import Input
from ...ops.block_diagonal import block_diagonal
from .base import FusedTuner, linear


class FusedOft(FusedTuner, Linear):
    """y = (x diag(R_1, …, R_n)) Wᵀ + b, R_i orthogonal by PEFT's own Cayley transform

    x is turned in one pass. PEFT's forward applies no ``module_dropout``, and this one none either.
    """

    per_adapter = "oft_R"

    def why_not_adapter(self: Any, name: str) -> str | None:
        """Several turn x one after the other."""
        several = sum(one in self.oft_R for one in self.active_adapters) > 1
        return "its active adapters turn x one after the other" if several else None

    def update(self: Any, name: str, x: Tensor) -> Input:
        """In the dtype of the adapter, as PEFT."""
        module = self.oft_R[name]
        if module.coft:
            with torch.no_grad():
                module.weight.copy_(module._project_batch(module.weight, eps=module.eps))
        size = module.block_size
        terms = (module.use_cayley_neumann, module.num_cayley_neumann_terms)
        blocks = module._cayley_batch(module.weight, size, *terms)
        read = self._cast_input_dtype(x, blocks.dtype)
        if module.block_share:
            return Input((read.unflatten(-1, (-1, size)) @ blocks[0].to(read.dtype)).flatten(-2).to(x.dtype))
        return Input(block_diagonal(read, blocks.to(read.dtype)).to(x.dtype))


TAKEOVERS = {Linear: linear(FusedOft)}
