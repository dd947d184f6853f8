"""act(gate) ⊙ up, in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(gate: Tensor, activation: str) -> Tensor:
    """SiLU, GELU by the error function, or GELU by tanh."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def composite(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The equation with autograd's own derivative: the oracle."""
    return activate(gate, activation) * up


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The op of ``_ops.py``."""
    return activate(gate.contiguous(), activation).mul_(up)


def glu_backward(dproduct: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    gate = gate.contiguous()
    inner = dproduct.contiguous() * up
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(inner, gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dgate = torch.ops.aten.gelu_backward(inner, gate, approximate=approximate)
    return dgate, activate(gate, activation).mul_(dproduct)
