"""MoSLoRA's own promises."""

from __future__ import annotations

import pytest
import torch
from cases import IN, OUT, RANK, new_layer, shake
from oracles import agrees, shape_of_x, trained

from lora_kernels.nn import LoRALinear


def branch(adapter, x):
    return 6 / RANK * x @ adapter.lora_A.T @ adapter.mixer.T @ adapter.lora_B.T


def test_values_and_gradients_of_three_linears_in_a_row():
    layer = shake(new_layer("moslora"))
    agrees(layer, branch)
    assert trained(layer) == RANK * (IN + OUT) + RANK**2


def test_the_mixer_s_gradient():
    layer, x = shake(new_layer("moslora")), shape_of_x(5)
    adapter, dy = layer.adapters["default"], torch.randn(5, OUT, dtype=torch.float64)
    layer(x).backward(dy)
    want = 6 / RANK * (dy @ adapter.lora_B).T @ (x @ adapter.lora_A.T)
    torch.testing.assert_close(adapter.mixer.grad, want)


def test_with_the_identity_it_is_lora():
    mixed = new_layer("moslora", method_options={"mixer": "eye"})
    lora, adapter = shake(new_layer("lora")), mixed.adapters["default"]
    assert torch.equal(adapter.mixer, torch.eye(RANK, dtype=torch.float64))
    mixed.load_state_dict({**mixed.state_dict(), **lora.state_dict()})
    x = shape_of_x(3)
    torch.testing.assert_close(mixed(x), lora(x))


def test_two_subspaces_mixed():
    """M = 1₂ₓ₂ ⊗ I is (B₁ + B₂)(A₁ + A₂)."""
    adapter, half = shake(new_layer("moslora")).adapters["default"], RANK // 2
    with torch.no_grad():
        adapter.mixer.copy_(torch.eye(half).repeat(2, 2))
    a, b = adapter.lora_A, adapter.lora_B
    want = 6 / RANK * (b[:, :half] + b[:, half:]) @ (a[:half] + a[half:])
    torch.testing.assert_close(adapter.delta(), want)


def test_an_orthogonal_mixer_and_a_bad_one():
    mixer = new_layer("moslora", method_options={"mixer": "orthogonal"}).adapters["default"].mixer
    torch.testing.assert_close(mixer @ mixer.T, torch.eye(RANK, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mixer: expected one of \('kaiming', .*got 'x'"):
        LoRALinear(4, 4, r=2, method="moslora", method_options={"mixer": "x"})


def test_an_e_between_a_frozen_a_and_b():
    options = {"mixer": "eye", "train_a": False}
    layer = new_layer("moslora", init_lora_weights="asym", method_options=options)
    adapter = layer.adapters["default"]
    unit = torch.eye(RANK, dtype=torch.float64)
    torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.T, unit)
    assert not adapter.delta().any() and torch.equal(adapter.mixer, unit)
    assert trained(layer) == RANK * OUT + RANK**2
    agrees(shake(layer), branch)


def test_it_takes_no_start_that_changes_w():
    with pytest.raises(ValueError, match="moslora expects a start that leaves W as it is, got 'pissa'"):
        LoRALinear(4, 4, r=2, method="moslora", init_lora_weights="pissa")
