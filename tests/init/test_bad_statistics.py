"""Every start that reads statistics or W refuses what does not fit, by name, and leaves the model alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.init import INITIALISERS

NEEDS = {name: one.needs for name, one in INITIALISERS.items() if one.needs}
# What each statistic's shape is on a layer of 12 outputs and 16 inputs.
SHAPES = {"covariance": (16, 16), "activation_svd": (16, 16), "gradient": (12, 16), "expressive": (12, 16)}
DECOMPOSING = (
    "clusters",
    "pissa",
    "pissa_niter_2",
    "milora",
    "mica",
    "olora",
    "corda",
    "eva",
    "lora_ga",
    "expressive",
)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16))


def statistics(init, first):
    """Good ones of the second layer, and these of the first."""
    need = NEEDS[init]
    torch.manual_seed(1)
    rows = torch.randn(16 if need == "gradient" or need == "expressive" else 12, 12)
    return {"0": {need: first}, "2": {need: rows.T @ rows if need == "covariance" else rows}}


def refused(init, words, given, **options):
    net, before = model(), model()
    config = LoRAConfig(target_modules=["0", "2"], init_lora_weights=init, **{"r": 4, **options})
    with pytest.raises((ValueError, TypeError), match=words):
        apply_lora(net, config, statistics=given)
    assert [type(one) for one in net] == [nn.Linear, nn.ReLU, nn.Linear]
    for one, other in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad


def test_every_statistic_has_a_shape_here():
    assert set(NEEDS.values()) == set(SHAPES)


@pytest.mark.parametrize("init", NEEDS)
def test_none_at_all_or_of_other_layers(init):
    words = f"'{init}' needs the statistic '{NEEDS[init]}' of 0"
    refused(init, words, None)
    refused(init, words, {"elsewhere": {NEEDS[init]: torch.zeros(SHAPES[NEEDS[init]])}})
    refused(init, words, {"0": {"other": torch.zeros(3)}})


@pytest.mark.parametrize("init", NEEDS)
@pytest.mark.parametrize("shape", [(3, 5), (16,), (16, 17), (1, 16, 16)], ids=str)
def test_of_another_shape(init, shape):
    refused(init, rf"statistics: 0: expected {NEEDS[init]} of shape", statistics(init, torch.randn(shape)))


@pytest.mark.parametrize("init", NEEDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_that_are_not_finite(init, value):
    given = torch.full(SHAPES[NEEDS[init]], value)
    refused(init, f"statistics: 0: expected finite {NEEDS[init]}", statistics(init, given))


@pytest.mark.parametrize("init", NEEDS)
def test_that_are_no_tensors(init):
    refused(init, f"statistics: 0: expected {NEEDS[init]} as a tensor, got list", statistics(init, [1.0]))


@pytest.mark.parametrize("init", DECOMPOSING)
def test_a_rank_above_the_sides_of_w(init):
    given = statistics(init, torch.randn(SHAPES[NEEDS[init]])) if init in NEEDS else None
    refused(init, rf"r: '{init}' expects at most \d+ of 0, got 17", given, r=17)
