"""PSIM: one pass is two, labels are uniform, and what is flagged is what the formula says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.compose import PSIM, psim_flag, reset_labels
from lora_kernels.nn import set_adapter, train_adapters


def test_prediction_is_two_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    config = LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, lora_alpha=40)
    train_adapters(model, dict.fromkeys(("victim", "psim"), config))
    x = torch.randn(50, 6).double()
    got = PSIM(model, threshold=0.6).predict(x)
    answers = {}
    for name in ("victim", "psim"):
        set_adapter(model, name)
        answers[name] = model(x).softmax(-1)
    sure = answers["psim"].max(-1).values > 0.6
    assert 0 < int(sure.sum()) < 50
    want = torch.where(sure, -1, answers["victim"].argmax(-1))
    assert torch.equal(got, want)


def test_labels_are_uniform_and_by_seed():
    labels = torch.zeros(6000, dtype=torch.long)
    drawn = reset_labels(labels, 3, torch.Generator().manual_seed(0))
    assert drawn.dtype == labels.dtype and torch.equal(
        drawn, reset_labels(labels, 3, torch.Generator().manual_seed(0))
    )
    assert (drawn.bincount() - 2000).abs().max() < 150


def test_flags_are_monotone_in_the_threshold():
    logits = torch.randn(100, 4)
    flags = [psim_flag(logits, t) for t in (0.0, 0.3, 0.5, 0.7, 1.0)]
    for low, high in itertools.pairwise(flags):
        assert bool((low | ~high).all())
    assert flags[0].all() and not flags[-1].any()
    with pytest.raises(ValueError, match=r"threshold: expected 0 to 1, got 1.5"):
        PSIM(nn.Linear(2, 2), threshold=1.5)
    with pytest.raises(ValueError, match="classes: expected at least 2, got 1"):
        reset_labels(torch.zeros(3), 1)
