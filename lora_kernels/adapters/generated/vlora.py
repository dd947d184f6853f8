"""VLoRA: an A for each sample, made of its image."""

from __future__ import annotations

from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank


@register("vlora")
class VLoRA(Adapter):
    """y_b = x_b Wᵀ + (α/r) · (x_b A_bᵀ) Bᵀ for each sample b

    VLoRA (Ma et al., 2024, arXiv 2405.20339): what the model sees comes in by weights and not by tokens. B
    ``[out, r]`` trains, from 0; the A_b ``[samples, r, in]`` of each layer come with the call, by the layer's
    name: ``with side_inputs(model, vlora_A=generator(features)): model(ids)``, with
    :class:`lora_kernels.nn.VLoRAGenerator` or any other. Their gradients flow back to it.
    """

    plain, mergeable = False, False

    def build(self, site: Site) -> Start:
        """A B of zeros."""
        return Start({"lora_B": site.zeros(site.out_features, self.r)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """One A for each sample along x's first dimension.

        Raises:
            ValueError: the call has no A for this layer, or one of another shape.
        """
        given = {} if call is None else call["vlora_A"]
        lora_a = given.get(self.site)
        if lora_a is None or tuple(lora_a.shape[1:]) != (self.r, self.in_features):
            got = "none" if lora_a is None else f"shape {tuple(lora_a.shape)}"
            raise ValueError(
                f"vlora_A: expected [samples, {self.r}, {self.in_features}] for the layer {self.site!r},"
                f" got {got}"
            )
        return LowRank(lora_a, self.lora_B, self.scaling)
