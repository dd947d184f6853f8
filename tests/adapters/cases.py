"""How the invariants build and call each registered method; what a method needs is in ``method_cases``."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels.nn import LoRALinear, side_inputs
from lora_kernels.testing.method_cases import IN, OUT, RANK, case

__all__ = ["IN", "OUT", "RANK", "case", "new_layer", "options", "run", "shake"]


def options(method: str, **given: Any) -> dict[str, Any]:
    """The fields of a LoRAConfig of this method."""
    return {"r": RANK, "lora_alpha": 6, "method": method, **case(method).options, **given}


def new_layer(method: str, *, dtype=torch.float64, bias=True, **given) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(IN, OUT, bias=bias, dtype=dtype, **options(method, **given))


def run(layer: torch.nn.Module, x: torch.Tensor, method: str) -> torch.Tensor:
    """The layer's output for x, with the side inputs that the method needs."""
    side = case(method).side(x)
    if not side:
        return layer(x)
    with side_inputs(layer, **side):
        return layer(x)


def shake(layer: torch.nn.Module) -> torch.nn.Module:
    """Random values for all that trains, as after some steps, and for what it started from zeros: they would
    hide errors."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad or ("adapters." in name and not parameter.any()):
                parameter.normal_()
    return layer
