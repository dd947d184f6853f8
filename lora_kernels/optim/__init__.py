"""Optimisers for adapters, and for base weights that train through them."""

from __future__ import annotations

from .derivative_free import DerivativeFree
from .flora import Flora, FloraAccumulator, compressed_weight_grad
from .galore import GaLoreAdamW
from .lora_fa import LoRAFA
from .lora_plus import lora_plus, lora_plus_groups
from .riemannian import riemannian

__all__ = [
    "DerivativeFree",
    "Flora",
    "FloraAccumulator",
    "GaLoreAdamW",
    "LoRAFA",
    "compressed_weight_grad",
    "lora_plus",
    "lora_plus_groups",
    "riemannian",
]
