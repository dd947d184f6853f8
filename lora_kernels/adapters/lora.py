"""LoRA and rsLoRA."""

from __future__ import annotations

from .base import Adapter, register


@register("lora")
class LoRA(Adapter):
    """ΔW = (α/r) · B A

    LoRA (Hu et al., 2021, arXiv 2106.09685); with ``use_rslora`` the scale is α/√r (Kalajdzievski, 2023,
    arXiv 2312.03732). A ``[r, in]`` and B ``[out, r]`` train; B starts at zero.
    """
