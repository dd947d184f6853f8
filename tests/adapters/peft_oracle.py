"""A model of two linears under one of PEFT's tuners and under ours, on the same weights."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter

WIDE = torch.float64


class Pair(nn.Module):
    """Two linears of different shapes; dropout-free."""

    def __init__(self, hidden=16, inner=32):
        super().__init__()
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def base(seed=0):
    torch.manual_seed(seed)
    return Pair().to(WIDE)


def shaken(model):
    """Random values for all that trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def theirs(config: peft.PeftConfig) -> nn.Module:
    model = peft.get_peft_model(base(), config).to(WIDE)
    return shaken(model)


def read_by_us(model: nn.Module, folder) -> nn.Module:
    """What PEFT's model saved, read by us."""
    model.save_pretrained(folder)
    return load_adapter(base(), folder)


def read_by_peft(config: LoRAConfig, folder) -> tuple[nn.Module, nn.Module]:
    """Ours, and what PEFT makes of its file."""
    ours = shaken(apply_lora(base(), config))
    save_adapter(ours, folder)
    return ours, peft.PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=False).to(WIDE)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of each adapter tensor, by the end of its name."""
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours: nn.Module, other: nn.Module, x: torch.Tensor, names: Any) -> None:
    """Compares the gradients of tensors whose name has one of ``names`` in it, in the order of the layers."""
    found = [gradients(model, x) for model in (ours, other)]
    for name in names:
        mine, others = ([g for key, g in grads.items() if name in key] for grads in found)
        assert mine and len(mine) == len(others), name
        for one, two in zip(mine, others, strict=True):
            torch.testing.assert_close(one, two.reshape(one.shape), rtol=1e-10, atol=1e-10)
