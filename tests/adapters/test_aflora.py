"""AFLoRA's own promises; what freezes A and B is a schedule."""

from __future__ import annotations

import pytest
import torch
from cases import IN, OUT, RANK, new_layer, shake
from oracles import agrees, saved_shapes, shape_of_x, trained

from lora_kernels.nn import LoRALinear


def branch(m, x):
    return 6 / RANK * m.out_scale * ((m.rank_scale * (x @ m.lora_A.T)) @ m.lora_B.T)


def test_values_gradients_and_count():
    layer = shake(new_layer("aflora"))
    agrees(layer, branch)
    assert trained(layer) == RANK * (IN + OUT) + RANK + OUT


def test_at_the_start_the_output_scale_alone_moves():
    layer = new_layer("aflora")
    layer(shape_of_x(4)).square().sum().backward()
    moved = {name: p.grad.abs().max().item() > 0 for name, p in layer.adapters["default"].named_parameters()}
    assert moved == {"lora_A": False, "lora_B": False, "rank_scale": False, "out_scale": True}


def test_square_layers_train_their_scales_alone_and_save_no_input():
    layer = LoRALinear(IN, IN, r=RANK, method="aflora", dtype=torch.float64)
    assert trained(layer) == RANK + IN
    assert (5, IN) not in saved_shapes(layer, torch.randn(5, IN, dtype=torch.float64))
    other = LoRALinear(IN, IN, r=RANK, method="aflora", method_options={"train_square": True})
    assert trained(other) == 2 * RANK * IN + RANK + IN


def test_the_forward_of_vera():
    """PEFT's VeRA with these very A, B and scales."""
    peft = pytest.importorskip("peft")
    layer = shake(new_layer("aflora", lora_alpha=RANK, bias=False))
    adapter = layer.adapters["default"]
    base = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False, dtype=torch.float64))
    base[0].weight.data.copy_(layer.weight)
    vera = peft.get_peft_model(base, peft.VeraConfig(r=RANK, target_modules=["0"])).double()
    theirs = vera.base_model.model[0]
    with torch.no_grad():
        theirs.vera_A["default"].copy_(adapter.lora_A)
        theirs.vera_B["default"].copy_(adapter.lora_B)
        theirs.vera_lambda_d["default"].copy_(adapter.rank_scale)
        theirs.vera_lambda_b["default"].copy_(adapter.out_scale)
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), vera(x), rtol=1e-6, atol=1e-6)
