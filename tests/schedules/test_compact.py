"""Compact factors: the output stays, on our methods and PEFT's, and what is saved is read back."""

from __future__ import annotations

import pytest
import torch
from optim_models import batch, net, ours
from optim_models import peft as peft_model

from lora_kernels import accelerate, load_adapter, save_adapter
from lora_kernels.nn import apply_lora, lora_pairs
from lora_kernels.schedules import compact


@torch.no_grad()
def prune(model):
    """Leaves 2, 1 and none of the four ranks."""
    wide, tall, square = lora_pairs(model)
    wide.lora_a[[0, 2]] = 0
    tall.lora_b[:, 1:] = 0
    square.lora_a.zero_()


@pytest.mark.parametrize("rslora", [False, True])
def test_the_output_stays_and_a_file_is_read_back(rslora, tmp_path):
    model = ours(use_rslora=rslora)
    prune(model)
    y = model(batch())
    assert compact(model) == {"wide": 2, "tall": 1, "square": 1}
    torch.testing.assert_close(model(batch()), y, rtol=1e-12, atol=1e-12)
    assert model.wide.adapters["default"].lora_A.shape == (2, 12)
    save_adapter(model, tmp_path)
    other = net()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(batch()), y, rtol=1e-6, atol=1e-6)


def test_a_gate_counts():
    model = ours(method="sora")
    with torch.no_grad():
        for layer in (model.wide, model.tall, model.square):
            layer.adapters["default"].gate[1:3] = 0
    y = model(batch())
    assert compact(model) == {"wide": 2, "tall": 2, "square": 2}
    torch.testing.assert_close(model(batch()), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_on_a_peft_model(fused, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft_model()
    if fused:
        accelerate(model)
    prune(model)
    y = model(batch())
    ranks = compact(model)
    assert sorted(ranks.values()) == [1, 1, 2]
    torch.testing.assert_close(model(batch()), y, rtol=1e-12, atol=1e-12)
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(net(), tmp_path).double()
    torch.testing.assert_close(other(batch()), y, rtol=1e-6, atol=1e-6)


def test_bad_input_changes_nothing():
    with pytest.raises(ValueError, match="model: expected a model with LoRA layers"):
        compact(net())
    model = ours(method="dylora")
    with pytest.raises(ValueError, match="model: wide: expected one of lora, sora, adalora, got dylora"):
        compact(model)
    merged = ours()
    prune(merged)
    merged.square.merge()
    with pytest.raises(ValueError, match="model: square: expected adapters that are not merged"):
        compact(merged)
    assert merged.wide.adapters["default"].lora_A.shape == (4, 12) and apply_lora is not None
