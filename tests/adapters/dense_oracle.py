"""A layer against a dense expression of its own tensors, values and every gradient, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import LoRALinear

IN, OUT, R = 12, 10, 4
WIDE = torch.float64


def shaken(layer: nn.Module) -> nn.Module:
    """Random values for all that trains."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return layer


def linear(method: str, r: int = R, **options: Any) -> LoRALinear:
    torch.manual_seed(0)
    config = {"r": r, "lora_alpha": 6, "method": method, "method_options": options}
    return shaken(LoRALinear(IN, OUT, dtype=WIDE, **config))


def agrees(layer: Any, x: Tensor, want: Callable[[Any, Tensor], Tensor], *more: Tensor) -> None:
    """Compares y and the gradients of x, of all that trains and of ``more`` with those of ``want``."""
    x.requires_grad_()
    leaves = [x, *(p for p in layer.adapters.parameters() if p.requires_grad), *more]
    y, expected = layer(x), want(layer.adapters["default"], x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def refuses(message: str, base: nn.Module | None = None, **config: Any) -> None:
    """A config that ``apply_lora`` refuses, the model as it was."""
    model = nn.Sequential(nn.Linear(IN, OUT) if base is None else base)
    before = model[0]
    with pytest.raises((ValueError, TypeError), match=message):
        apply_lora(model, LoRAConfig(**{"r": R, "target_modules": ["0"], **config}))
    assert model[0] is before and all(p.requires_grad for p in model.parameters())


def trained(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)
