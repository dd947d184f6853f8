"""VB-LoRA against PEFT's, values, gradients and files both ways."""

from __future__ import annotations

import pytest
import torch
from peft import VBLoRAConfig
from peft_oracle import WIDE, base, read_by_peft, read_by_us, same_gradients, theirs
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import lora_layers

HIDDEN, INNER, R, COUNT, LENGTH = 16, 32, 3, 6, 8
OPTIONS = {"num_vectors": COUNT, "vector_length": LENGTH}


def peft_config(**given):
    return VBLoRAConfig(r=R, target_modules=["up", "down"], vblora_dropout=0.0, **OPTIONS, **given)


def our_config(**given):
    return LoRAConfig(
        r=R, method="vblora", target_modules=["up", "down"], method_options={**OPTIONS, **given}
    )


@pytest.mark.parametrize("topk", [1, 2, 6])
def test_reads_what_peft_writes(tmp_path, topk):
    model, x = theirs(peft_config(topk=topk)), torch.randn(5, HIDDEN, dtype=WIDE)
    ours = read_by_us(model, tmp_path)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-12, atol=1e-12)
    same_gradients(ours, model, x, ("logits_A", "logits_B", "vector_bank"))


def test_reads_a_file_of_the_chosen_weights_alone(tmp_path):
    model, x = theirs(peft_config(save_only_topk_weights=True)), torch.randn(5, HIDDEN, dtype=WIDE)
    torch.testing.assert_close(read_by_us(model, tmp_path)(x), model(x), rtol=1e-10, atol=1e-10)


def test_peft_reads_what_we_write(tmp_path):
    ours, model = read_by_peft(our_config(topk=3), tmp_path)
    x = torch.randn(5, HIDDEN, dtype=WIDE)
    torch.testing.assert_close(model(x), ours(x), rtol=1e-12, atol=1e-12)


def test_one_bank_whose_gradient_is_the_sum_and_the_count():
    model = apply_lora(base(), our_config())
    adapters = [layer.adapters["default"] for layer in lora_layers(model).values()]
    assert adapters[0].vblora_vector_bank is adapters[1].vblora_vector_bank
    subvectors = 2 * R * (HIDDEN + INNER) // LENGTH
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == COUNT * LENGTH + subvectors * COUNT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector_length": 5}, "vector_length: vblora expects a divisor of in_features = 16, got 5"),
        ({"topk": 7}, "topk: expected at most num_vectors = 6, got 7"),
        ({"num_vectors": 0}, "num_vectors: expected at least 1, got 0"),
    ],
)
def test_bad_options_leave_the_model_alone(options, message):
    model = base()
    with pytest.raises(ValueError, match=message):
        apply_lora(model, our_config(**options))
    assert type(model.up) is nn.Linear and all(p.requires_grad for p in model.parameters())
