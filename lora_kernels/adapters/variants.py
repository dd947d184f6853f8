"""LoRA with what a field of its own adds: a bias, or tokens from which on it acts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import variant_of
from .call import Call
from .lora import LoRA
from .site import Site, Start
from .update import LowRank, Shifted, Update

# The side input that says which tokens an adapter acts on: invocation tokens -> mask [batch, length].
INVOKED = "invoked"


@variant_of(LoRA, lambda config: bool(config.lora_bias))
class BiasedLoRA(LoRA):
    """y = x Wᵀ + b + s · (drop(x) Aᵀ Bᵀ + b_B)

    ``LoRAConfig(lora_bias=True)``: b_B ``[out]`` trains beside A and B, and starts at zero where B does.
    """

    lora_bias: nn.Parameter
    any_start = False
    plain = False
    beyond_weight = True
    splits = {}  # noqa: RUF012

    def build(self, site: Site) -> Start:
        """LoRA's A and B, and b_B; of a random start as ``nn.Linear`` draws it."""
        tensors, rest = super().build(site)
        bias = site.zeros(site.out_features)
        if site.config.init_lora_weights is False:
            nn.init.uniform_(bias, -(self.r**-0.5), self.r**-0.5)
        return Start({**tensors, "lora_bias": bias}, rest)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Update:  # type: ignore[override]
        """A, B and s, and s · b_B."""
        return Shifted(super().lower(x, call), self.scaling * self.lora_bias)


@variant_of(LoRA, lambda config: bool(config.alora_invocation_tokens))
class ActivatedLoRA(LoRA):
    """y_t = x_t Wᵀ + [t ≥ t₀] s · drop(x_t) Aᵀ Bᵀ, t₀ where the invocation tokens last begin

    aLoRA (Greenewald et al., 2025, arXiv 2504.12397), ``LoRAConfig(alora_invocation_tokens=[…])``: what comes
    before them is the base's, its cache too. A sample without them is all the base's.
    """

    any_start = True
    plain = False
    mergeable = False
    beyond_weight = True
    passes_on = True
    splits = {}  # noqa: RUF012

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A, B and s, with a gate that is 0 or 1 for each token."""
        tokens = tuple(self.config.alora_invocation_tokens or ())
        mask = None if call is None else call.get(INVOKED, {}).get(tokens)
        like = self.lora_A
        if mask is None or x is None:
            return LowRank(like, self.lora_B, self.scaling, like.new_zeros(self.r))
        return LowRank(like, self.lora_B, self.scaling, _rows_of(mask, x).to(like.dtype))


def _rows_of(mask: Tensor, x: Tensor) -> Tensor:
    """The mask ``[batch, length]`` for the rows of x, which may be the last ones or lie flat."""
    if x.dim() == 2 and x.shape[0] == mask.numel():
        return mask.reshape(-1, 1)
    if x.dim() != 3 or x.shape[0] != mask.shape[0] or x.shape[1] > mask.shape[1]:
        raise ValueError(
            "alora_invocation_tokens: expected layers whose x is [batch, length, features] of"
            f" {tuple(mask.shape)} tokens, got shape {tuple(x.shape)}"
        )
    return mask[:, mask.shape[1] - x.shape[1] :, None]


@torch.no_grad()
def invoked(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Which tokens of ids ``[batch, length]`` lie behind the last beginning of ``tokens``, or in them."""
    batch, length = ids.shape
    if length < len(tokens):
        return ids.new_zeros(batch, length, dtype=torch.bool)
    windows = ids.unfold(1, len(tokens), 1)
    begins = (windows == ids.new_tensor(tokens)).all(-1)
    # 1 + the last beginning, 0 where there is none.
    last = (begins * torch.arange(1, begins.shape[1] + 1, device=ids.device)).amax(1, keepdim=True)
    return (torch.arange(1, length + 1, device=ids.device) >= last) & (last > 0)
