"""MiSS against PEFT's, values, gradients and files both ways."""

from __future__ import annotations

import peft
import pytest
import torch
from cases import shake
from torch import nn
from watched import SavedTensors

from lora_kernels import load_adapter, save_adapter
from lora_kernels.adapters import LoRAConfig, make
from lora_kernels.nn import LoRALinear, apply_lora


def model_of(sizes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], 7))


@pytest.mark.parametrize("sizes,r", [((12, 10), 4), ((13, 9), 5), ((6, 8), 6)])
def test_reads_what_peft_writes_with_its_gradients(sizes, r, tmp_path):
    config = peft.MissConfig(r=r, target_modules=["0"], mini_r=1)
    theirs = shake(peft.get_peft_model(model_of(sizes), config))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(model_of(sizes), tmp_path)
    x = torch.randn(2, 3, sizes[0], requires_grad=True)
    block = ours[0].adapters["default"].miss_block
    other = theirs.base_model.model[0].miss_block["default"]
    y, want = ours(x), theirs(x)
    torch.testing.assert_close(y, want)
    got = torch.autograd.grad(y.square().sum(), (x, block))
    for one, two in zip(got, torch.autograd.grad(want.square().sum(), (x, other)), strict=True):
        torch.testing.assert_close(one, two)


def test_peft_reads_what_is_written(tmp_path):
    ours = model_of((13, 9))
    apply_lora(ours, LoRAConfig(r=5, lora_dropout=0.25, method="miss", target_modules=["0"]))
    shake(ours).eval()
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model_of((13, 9)), tmp_path)
    config = theirs.peft_config["default"]
    assert (config.peft_type, config.r, config.miss_dropout) == (peft.PeftType.MISS, 5, 0.25)
    x = torch.randn(3, 13)
    torch.testing.assert_close(theirs.eval()(x), ours(x))


def test_other_forms_of_peft_are_refused(tmp_path):
    config = peft.MissConfig(r=4, target_modules=["0"], init_weights="bat")
    peft.get_peft_model(model_of((12, 8)), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"peft_type: .*'MISS'"):
        load_adapter(model_of((12, 8)), tmp_path)


def test_parameters_and_what_is_saved():
    layer = shake(LoRALinear(48, 40, r=4, method="miss"))
    with SavedTensors() as saved:
        layer(torch.randn(1000, 48))
    assert saved.elements(*layer.parameters()) <= 1.05 * 4 * 1000
    assert sum(p.numel() for p in layer.adapters.parameters()) == 4 * 40
    with pytest.raises(ValueError, match="r: miss expects at most in_features = 3, got 4"):
        make(3, 9, LoRAConfig(r=4, method="miss"))
