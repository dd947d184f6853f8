"""ShareLoRA: one A, one B or both for all layers of a role."""

from __future__ import annotations

from functools import partial

from ..base import register
from ..lora import LoRA
from ..site import Site, Start


@register("sharelora")
class ShareLoRA(LoRA):
    """ΔW_l = (α/r) · B_l A, (α/r) · B A_l or (α/r) · B A, over the layers l of one role

    ShareLoRA (Song et al., 2024, arXiv 2406.10785). A role is the last part of a layer's name (``q_proj``);
    what is shared is one parameter for its layers of one size, whose gradient is their sum, saved once.
    ``method_options={"share": …}``: ``"A"`` (the paper's choice), ``"B"`` or ``"AB"``.
    """

    options = frozenset({"share"})
    peft = False  # whose files have a factor for each layer
    splits = {}  # noqa: RUF012  (each process would hold parts of its own)

    def build(self, site: Site) -> Start:
        """LoRA's A and B, of which the shared ones are those of the first layer of the role."""
        share = site.option("share", "A", ("A", "B", "AB"))
        role = site.name.rpartition(".")[2]
        tensors = dict(super().build(site).tensors)
        for name in (f"lora_{one}" for one in share):
            key = (name, role, tensors[name].shape)
            tensors[name] = site.shared(key, partial(tensors.__getitem__, name))
        return Start(tensors)
