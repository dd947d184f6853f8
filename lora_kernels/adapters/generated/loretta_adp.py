"""LoRETTA_adp: a bottleneck of tensor trains beside a linear."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank
from .loretta_rep import LoRETTARep

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


@register("loretta_adp")
class LoRETTAAdp(LoRETTARep):
    """y = x Wᵀ + (α/r) · (B act(A x + b_down) + b_up), A and B tensor trains as in LoRETTA_rep

    LoRETTA_adp (Yang et al., 2024, arXiv 2402.11417), its parallel form;
    :class:`lora_kernels.nn.SerialAdapter` has it before or behind a linear. r is the bottleneck (64 in the
    paper, with scale 1: α = r). The cores and both biases train. Options: those of LoRETTA_rep and
    ``activation``: tanh (the default), relu, gelu, silu. It merges into no weight.
    """

    options = LoRETTARep.options | {"activation"}
    plain, reads_x, mergeable = False, True, False

    def build(self, site: Site) -> Start:
        """The cores, and biases of 0."""
        self.activation = site.option("activation", "tanh", tuple(ACTIVATIONS))
        biases = {"bias_down": site.zeros(self.r), "bias_up": site.zeros(site.out_features)}
        return Start({**super().build(site).tensors, **biases})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """b_up is one more column of B, for an h that is one more 1."""
        assert x is not None
        lora_a, lora_b = self.contracted()
        h = ACTIVATIONS[self.activation](F.linear(self.drop(x).to(lora_a.dtype), lora_a, self.bias_down))
        h = F.pad(h, (0, 1), value=1.0)
        return LowRank(
            None, torch.cat([lora_b, self.bias_up[:, None]], 1), self.scaling, x_lora=h.to(x.dtype)
        )
