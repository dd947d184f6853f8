"""How the invariants build each registered method, where its defaults do not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_kernels.nn import LoRALinear, side_inputs

IN, OUT, RANK = 12, 10, 4


@dataclass
class Case:
    """Options of the config, and the side inputs that a call of the layer on x needs."""

    options: dict[str, Any] = field(default_factory=dict)
    side: Callable[[torch.Tensor], dict[str, Any]] = lambda x: {}


# A method that needs none has no line here.
CASES: dict[str, Case] = {}


def case(method: str) -> Case:
    return CASES.get(method, Case())


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
    """Random values for all that trains, as after some steps: zeros would hide errors."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return layer
