"""LoftQ: factors that make up for what quantising W loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..ops.dequantize import dequantize
from ..quant import quantize
from .base import Drawn, balanced, check_rank, given_weight, register, scaling_of

if TYPE_CHECKING:
    from ..adapters.site import Site

_FORMATS = {4: "nf4", 8: "int8"}


@register("loftq", options=("loftq_bits", "loftq_iter"))
def draw_loftq(site: Site) -> Drawn:
    """Q ← quant(W - s · B A), s · B A ← the first r singular vectors of W - Q, so often; W becomes Q

    LoftQ (Li et al., 2023, arXiv 2310.08659). ``method_options``: ``loftq_bits`` 4 (nf4) or 8 (int8), and
    ``loftq_iter``, 1 by default. Start from the dense model and quantise it then to the same format, which
    finds the same Q: ``quantize_base(model, "nf4")``. s is taken out of the factors, which PEFT's leaves in.
    """
    r, weight = check_rank(site), given_weight(site)
    format = _FORMATS[site.option("loftq_bits", 4, tuple(_FORMATS))]
    rounds = site.option("loftq_iter", 1)
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"method_options: loftq_iter: expected an int of at least 1, got {rounds!r}")
    scaling, part = scaling_of(site), torch.zeros_like(weight)
    for _ in range(rounds):
        held = dequantize(quantize(weight - part, format)).to(weight.dtype)
        u, s, vh = torch.linalg.svd(weight - held, full_matrices=False)
        lora_a, lora_b = balanced(u[:, :r], s[:r], vh[:r], scaling)
        part = scaling * (lora_b @ lora_a)
    return Drawn(lora_a, lora_b, held.to(site.weight.dtype))
