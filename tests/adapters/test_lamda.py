"""LaMDA's own promises."""

from __future__ import annotations

import pytest
import torch
from cases import IN, OUT, RANK, new_layer, shake
from oracles import agrees, saved_shapes, shape_of_x, trained

from lora_kernels.nn import LoRALinear


@pytest.mark.parametrize("start", ["random", "svd"])
def test_values_gradients_and_count(start):
    layer = new_layer("lamda", method_options={"start": start})
    assert layer.adapters["default"].delta().abs().max() == 0
    agrees(shake(layer), lambda m, x: 6 / RANK * x @ m.lora_A.T @ m.core.T @ m.lora_B.T)
    assert trained(layer) == RANK * OUT + RANK**2


def test_the_spectral_start_is_that_of_the_weight():
    layer = new_layer("lamda", method_options={"start": "svd"})
    adapter = layer.adapters["default"]
    u, s, vh = torch.linalg.svd(layer.weight.detach())
    projected = adapter.lora_B @ (adapter.lora_B.T @ layer.weight @ adapter.lora_A.T) @ adapter.lora_A
    torch.testing.assert_close(projected, u[:, :RANK] * s[:RANK] @ vh[:RANK])


@pytest.mark.parametrize("method", ["lamda", "lora_xs"])
def test_x_is_not_saved(method):
    rows, layer = 37, shake(new_layer(method))
    shapes = saved_shapes(layer, shape_of_x(rows))
    assert (rows, IN) not in shapes and (rows, RANK) in shapes


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"start: expected one of \('random', 'svd'\), got 'x'"):
        LoRALinear(4, 4, r=2, method="lamda", method_options={"start": "x"})
    with pytest.raises(ValueError, match=r"start: lamda's 'svd' expects a weight .* got 5 of 4"):
        LoRALinear(6, 4, r=5, method="lamda", method_options={"start": "svd"})
