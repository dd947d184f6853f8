"""A, B and s of every layer, ours and PEFT's, and the weight they change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, quantize_base
from lora_kernels.nn import set_adapter
from lora_kernels.nn.pairs import lora_pairs


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 4, 3)
        self.linear = nn.Linear(12, 8)


OPTIONS = dict(r=2, lora_alpha=6, target_modules=["table", "conv", "linear"], lora_dropout=0.25)


def check_deltas(pairs, merged):
    """s · B A is what merging adds to W as the pair shows it."""
    assert [pair.name.rpartition(".")[2] for pair in pairs] == ["table", "conv", "linear"]
    for pair in pairs:
        with torch.no_grad():
            pair.lora_a.normal_()
            pair.lora_b.normal_()
    before = [pair.weight.clone() for pair in pairs]
    assert [tuple(w.shape) for w in before] == [(6, 9), (4, 18), (8, 12)]
    deltas = [pair.scaling * (pair.lora_b.flatten(1) @ pair.lora_a.flatten(1)) for pair in pairs]
    for pair, weight, start, delta in zip(pairs, merged(), before, deltas, strict=True):
        torch.testing.assert_close(weight, start + delta)
        assert (pair.rank, pair.scaling, pair.plain) == (2, 3.0, True)
        assert pair.is_embedding == pair.name.endswith("table")
        assert pair.dropout_p == (0 if pair.is_embedding else 0.25)  # tokens are never dropped


def test_ours():
    model = apply_lora(Model(), LoRAConfig(**OPTIONS))
    pairs = list(lora_pairs(model))
    check_deltas(pairs, lambda: [pair.layer._matrix(pair.layer.merged_weight()) for pair in pairs])


def test_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoraConfig(**OPTIONS))
    pairs = list(lora_pairs(model))

    def merged():
        model.merge_adapter()
        return [pair.weight for pair in pairs]

    check_deltas(pairs, merged)


def test_of_transposed_linears():
    peft = pytest.importorskip("peft")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    ours = apply_lora(nn.ModuleDict({"a": conv1d(8, 12)}), LoRAConfig(r=2, target_modules=["a"]))
    theirs = peft.get_peft_model(
        nn.ModuleDict({"a": conv1d(8, 12)}), peft.LoraConfig(r=2, target_modules=["a"], fan_in_fan_out=True)
    )
    for model in (ours, theirs):
        (pair,) = lora_pairs(model)
        assert pair.weight.shape == (8, 12) == (pair.lora_b.shape[0], pair.lora_a.shape[1])
        pair.weight.zero_()
        assert pair.base.weight.count_nonzero() == 0  # a view


def test_only_what_is_active():
    model = apply_lora(Model(), LoRAConfig(r=2, target_modules=["linear"]))
    apply_lora(model, LoRAConfig(r=3, target_modules=["linear", "conv"]), "second")
    assert [(p.name, p.adapter) for p in lora_pairs(model)] == [("linear", "default")]
    set_adapter(model, ["default", "second"])
    assert [(p.name, p.rank) for p in lora_pairs(model)] == [("conv", 3), ("linear", 2), ("linear", 3)]


@pytest.mark.parametrize(
    "method, plain", [("lora", True), ("lora_fa", True), ("dora", False), ("lora_xs", False), ("sora", False)]
)
def test_whether_it_is_all(method, plain):
    model = apply_lora(Model(), LoRAConfig(r=2, target_modules=["linear"], method=method))
    assert [pair.plain for pair in lora_pairs(model)] == [plain]


def test_a_quantised_weight_is_none_of_them():
    model = quantize_base(nn.Sequential(nn.Linear(64, 64)))
    (pair,) = lora_pairs(apply_lora(model, LoRAConfig(r=2, target_modules=["0"])))
    assert pair.weight is None


def test_no_module():
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got dict"):
        list(lora_pairs({}))
