"""NeFT against the gradient of the whole weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import shake
from torch import nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import LoRALinear

WIDE = torch.float64


@pytest.mark.parametrize("options", [{"rows": [5, 0]}, {"columns": [9, 2, 4]}, {"rows": list(range(12))}])
def test_gradients_are_those_of_full_training_there(options):
    base = nn.Linear(16, 12, dtype=WIDE)
    layer = shake(LoRALinear.from_linear(base, LoRAConfig(method="neft", method_options=options)))
    ((what, at),) = options.items()
    neurons = layer.adapters["default"].neurons
    full = base.weight.detach().clone()
    view = full if what == "rows" else full.T
    view[at] += neurons.detach() if what == "rows" else neurons.detach().T
    full.requires_grad_(True)
    x, dy = torch.randn(2, 7, 16, dtype=WIDE, requires_grad=True), torch.randn(2, 7, 12, dtype=WIDE)
    y, want = layer(x), F.linear(x, full, base.bias)
    torch.testing.assert_close(y, want)
    dx, dfull = torch.autograd.grad(want, (x, full), dy)
    got_dx, got = torch.autograd.grad(y, (x, neurons), dy)
    torch.testing.assert_close(got_dx, dx)
    torch.testing.assert_close(got, dfull[at] if what == "rows" else dfull[:, at])


def test_what_is_not_chosen_never_moves():
    base = nn.Linear(16, 12)
    layer = LoRALinear.from_linear(base, LoRAConfig(method="neft", method_options={"rows": [3]}))
    optimizer = torch.optim.AdamW(
        [p for p in layer.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
    )
    for _ in range(3):
        layer(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
    moved = (layer.merged_weight() != base.weight).any(1)
    assert moved.nonzero().flatten().tolist() == [3]
