"""RST-LoRA: each token's input scaled by what the document's discourse says of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import register
from ..call import Call, expand_rows
from ..lora import LoRA
from ..update import LowRank


@register("rst_lora")
class RSTLoRA(LoRA):
    """Δy = (α/r) · B A (x ⊙ (1 + γ))

    RST-LoRA (Pu and Demberg, 2024, arXiv 2405.00657). ``call["token_scale"]`` is 1 + γ, not trained: one
    number for each token (x without its last dimension, or only the first ones) or, with as many dimensions
    as x, one for each element. :func:`rst_gamma` makes γ of a parser's output.
    """

    plain = False
    reads_x = True
    mergeable = False
    peft = False
    splits = {}  # noqa: RUF012

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A scale for each row as a gate, one for each element on the input."""
        scale = call["token_scale"]
        if scale.dim() == x.dim() and scale.shape[-1] != 1:
            return LowRank(self.lora_A, self.lora_B, self.scaling, x_lora=x * scale.to(x.dtype))
        return LowRank(self.lora_A, self.lora_B, self.scaling, expand_rows(scale, x))


def rst_gamma(
    relations: Tensor, unit_of_token: Tensor, variant: str = "p_wo", *, width: int = 0, after: bool = False
) -> Tensor:
    """γ from p(unit i is the nucleus of unit j with relation k) ``[units, units, k]``

    c[i, k] is the mean over j. ``variant``: ``p`` (probabilities) or ``b`` (1 where at least 0.5, before the
    mean, or with ``after`` after it: the paper does not say), then ``_wo`` (mean over k, γ ``[tokens]``) or
    ``_w``: γ ``[tokens, width]`` repeats the k numbers along the features, which is this package's choice,
    since the paper does not say how the two meet.

    Args:
        relations: of a parser, no unit the nucleus of itself.
        unit_of_token: ``[tokens]``, the unit that each belongs to.
        variant: ``p_wo``, ``p_w``, ``b_wo`` or ``b_w``.
        width: features of x, for ``_w``.
        after: when ``b`` compares.

    Raises:
        ValueError: no such variant, other shapes, or no width for ``_w``.
    """
    if variant not in ("p_wo", "p_w", "b_wo", "b_w"):
        raise ValueError(f"variant: expected 'p_wo', 'p_w', 'b_wo' or 'b_w', got {variant!r}")
    if relations.dim() != 3 or relations.shape[0] != relations.shape[1]:
        raise ValueError(f"relations: expected [units, units, k], got {tuple(relations.shape)}")
    binary = variant[0] == "b"
    chosen = (relations >= 0.5).to(relations.dtype) if binary and not after else relations
    index = chosen.mean(1)
    index = (index >= 0.5).to(index.dtype) if binary and after else index
    if variant.endswith("wo"):
        return index.mean(1)[unit_of_token]
    if width < 1:
        raise ValueError(f"width: expected the features of x for {variant!r}, got {width}")
    return index[unit_of_token][:, torch.arange(width, device=index.device) % index.shape[1]]
