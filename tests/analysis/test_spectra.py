"""Spectra, effective ranks, and what is learnt and forgotten, against dense decompositions in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.analysis import (
    biderman2024,
    effective_rank,
    effective_ranks,
    factor_spectrum,
    learning_forgetting,
    spectrum,
)


def matrix(values, rows=7, cols=5):
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(cols, len(values), dtype=torch.float64)).Q
    return u * torch.tensor(values, dtype=torch.float64) @ v.T


@pytest.mark.parametrize(
    ("values", "var", "rank"),
    [
        ([3.0, 1.0, 0.0], 0.9, 1),
        ([3.0, 1.0, 0.0], 0.91, 2),
        ([3.0, 1.0, 0.0], 1.0, 2),
        ([1.0, 1.0, 1.0, 1.0], 0.75, 3),
        ([1.0, 1.0, 1.0, 1.0], 0.76, 4),
        ([2.0], 0.5, 1),
        ([0.0, 0.0], 0.9, 0),
    ],
)
def test_effective_rank(values, var, rank):
    """9 of 10 is 90 %, and is enough."""
    assert effective_rank(torch.tensor(values), var) == rank
    assert effective_rank(matrix(values), var - 1e-9) == rank


def test_the_spectrum_of_a_change():
    before, change = torch.randn(7, 5, dtype=torch.float64), matrix([2.0, 0.5])
    found = spectrum(before, before + change)
    torch.testing.assert_close(found.before, torch.linalg.svdvals(before))
    torch.testing.assert_close(found.after, torch.linalg.svdvals(before + change))
    torch.testing.assert_close(found.change[:2], torch.tensor([2.0, 0.5], dtype=torch.float64))
    assert spectrum(before.half(), before.half()).change.dtype == torch.float32


def test_of_factors_it_is_that_of_their_product():
    a, b = torch.randn(3, 11, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    want = torch.linalg.svdvals(-1.5 * b @ a)
    torch.testing.assert_close(factor_spectrum(a, b, -1.5), want[:3])
    assert want[3:].max() < 1e-12


def linears():
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))


def peft_model():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(linears(), peft.LoraConfig(r=3, target_modules=["0", "1"]))


@pytest.mark.parametrize("make", [lambda: apply_lora(linears(), biderman2024(3)), peft_model])
def test_effective_ranks_of_a_model(make):
    model = make()
    assert set(effective_ranks(model).values()) == {0}  # B is zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert all(1 <= rank <= 3 for rank in effective_ranks(model).values())


def test_what_is_more_than_two_factors_is_refused():
    model = apply_lora(linears(), LoRAConfig(method="sora", target_modules=["0"]))
    with pytest.raises(ValueError, match="model: 0: expected an adapter that is s · B A and no more"):
        effective_ranks(model)


def test_learning_and_forgetting():
    assert learning_forgetting((2.0, 0.5), (1.0, 1.25)) == (1.5, 0.25)
    assert learning_forgetting((0.5, 0.75), (0.75, 0.25), higher_is_better=True) == (0.25, 0.5)


def test_the_recipe():
    config = biderman2024(64, lora_dropout=0.05)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 128, 0.05)
    assert config.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_rank(torch.ones(2), 0.0), "var: expected 0 < var"),
        (lambda: effective_rank(torch.ones(2), 1.1), "var: expected at most 1, got 1.1"),
        (lambda: effective_rank(torch.ones(2, 2, 2)), "change: expected a matrix or singular values, got 3"),
        (lambda: spectrum(torch.ones(2, 3), torch.ones(3, 2)), r"after: expected a matrix of shape \(2, 3\)"),
        (lambda: spectrum(torch.ones(2), torch.ones(2)), "after: expected matrices"),
        (lambda: factor_spectrum(torch.ones(2, 3), torch.ones(3, 3)), r"lora_b: expected \[out, r\]"),
        (lambda: biderman2024(0), "rank: expected at least 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
