"""The choices of SMT and NeFT find what a teacher changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import calibrate
from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import apply_lora
from lora_kernels.stats import energy_ranks, select_blocks, select_neurons


def test_blocks_by_each_score():
    g = torch.zeros(8, 12)
    g[0:4, 4:8] = 1.0
    g[4:8, 8:12] = torch.tensor([3.0, -3.0]).repeat(4, 2)
    assert select_blocks({"a": g}, 1, 4) == {"a": [(0, 1)]}
    for score in ("abs_mean", "l1", "l2"):
        assert select_blocks({"a": g}, 1, 4, score=score) == {"a": [(1, 2)]}
    both = {"a": g, "b": g / 2}
    assert select_blocks(both, 3, 4, score="l1") == {"a": [(0, 1), (1, 2)], "b": [(1, 2)]}
    assert select_blocks(both, 1, 4, per_layer=True) == {"a": [(0, 1)], "b": [(0, 1)]}


def test_blocks_of_a_warm_up_are_the_teachers():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))
    x = torch.randn(256, 16)
    with torch.no_grad():
        before = model[0].weight.clone()
        model[0].weight[4:8, 8:12] += 1.0
        want = model(x)
        model[0].weight.copy_(before)
    found = calibrate(
        model, [x], ("gradient",), target_modules=["0"], forward=lambda m, b: (m(b) - want).square().mean()
    )
    blocks = select_blocks(found, 1, 4, score="l2")
    assert blocks == {"0": [(1, 2)]}
    options = {"block": 4, "blocks": blocks}
    apply_lora(model, LoRAConfig(method="smt", target_modules=[*blocks], method_options=options))
    assert model[0].adapters["default"].blocks.shape == (1, 4, 4)


def test_neurons_that_turned_are_chosen_as_rows_and_columns():
    before = {
        "0.up_proj.weight": torch.randn(10, 6),
        "0.down_proj.weight": torch.randn(6, 10),
        "0.norm": torch.ones(6),
    }
    after = {key: value * 2 for key, value in before.items()}
    after["0.up_proj.weight"][3] = torch.randn(6)
    after["0.down_proj.weight"][:, [1, 7]] = torch.randn(6, 2)
    found = select_neurons(before, after, 3 / 20)
    assert found == {"rows": {"0.up_proj": [3]}, "columns": {"0.down_proj": [1, 7]}}
    model = nn.ModuleDict({"0": nn.ModuleDict({"up_proj": nn.Linear(6, 10), "down_proj": nn.Linear(10, 6)})})
    apply_lora(model, LoRAConfig(method="neft", target_modules="all-linear", method_options=found))
    assert model["0"]["down_proj"].adapters["default"].neurons.shape == (6, 2)


def test_bad_arguments_are_named():
    g = {"a": torch.randn(8, 8)}
    for options, words in (
        ({"count": 5, "block": 4}, "count: expected 1 to 4, got 5"),
        ({"count": 1, "block": 3}, r"block: expected a divisor of \(8, 8\) \(a\), got 3"),
        ({"count": 1, "block": 4, "score": "l3"}, "score: expected one of .* got 'l3'"),
    ):
        with pytest.raises(ValueError, match=words):
            select_blocks(g, **options)
    w = {"up_proj": torch.randn(4, 4)}
    with pytest.raises(ValueError, match="fraction: expected"):
        select_neurons(w, w, 0)
    with pytest.raises(ValueError, match="before: expected weights of layers"):
        select_neurons(g, g)
    with pytest.raises(ValueError, match="after: expected a weight"):
        select_neurons(w, {})


def test_flat_spectra_get_more_ranks():
    weights = {"flat": torch.eye(8), "steep": torch.diag(0.3 ** torch.arange(8.0)), "wide": torch.randn(3, 8)}
    ranks = energy_ranks(weights, 3)
    assert sum(ranks.values()) == 9 and ranks["flat"] > ranks["steep"] == 1 and ranks["wide"] <= 3

    def energy(name, r):
        squares = torch.linalg.svdvals(weights[name].double()).square()
        return float(squares[:r].sum() / squares.sum())

    # What has more than one rank needed the last of them: no layer with less energy was passed by.
    least = min(energy(name, r) for name, r in ranks.items() if r < min(weights[name].shape))
    assert all(energy(name, r - 1) <= least + 1e-9 for name, r in ranks.items() if r > 1)
    assert energy_ranks({"a": torch.eye(4)}, 4) == {"a": 4}
    for given, mean, words in (
        ({"a": torch.eye(4)}, 5, "mean_rank: expected 1 to 4, got 5"),
        ({}, 1, "mean_rank: expected 1 to 0"),
        ({"a": torch.zeros(2, 2)}, 1, "weights: a: expected a matrix that is not zero"),
    ):
        with pytest.raises(ValueError, match=words):
            energy_ranks(given, mean)
