"""Step for step what PEFT's own optimisers do, in fp64, also on a model that is accelerated."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from optim_models import assert_same, train
from optim_models import peft as peft_model

from lora_kernels import accelerate, optim

LR = 3e-3


def lora_plus_of_peft(model):
    from peft.optimizers import create_loraplus_optimizer

    options = {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 2e-3}
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=8, **options)


def lora_plus_of_ours(model):
    return optim.lora_plus(model, torch.optim.AdamW, lr=LR, ratio=8, lr_embedding=2e-3, weight_decay=0.1)


def lora_fa_of_peft(model):
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=LR, weight_decay=0.1)


def lora_fa_of_ours(model):
    return optim.LoRAFA(model, LR, weight_decay=0.1)


def riemannian_of_peft(cls):
    def make(model):
        from peft.optimizers import create_riemannian_optimizer

        return create_riemannian_optimizer(model, cls, lr=LR, reg=0.3)

    return make


def riemannian_of_ours(cls):
    return lambda model: optim.riemannian(model, cls, lr=LR, reg=0.3)


OPTIMIZERS = {
    "lora_plus": (lora_plus_of_peft, lora_plus_of_ours),
    "lora_fa": (lora_fa_of_peft, lora_fa_of_ours),
    "riemannian_adamw": (riemannian_of_peft(torch.optim.AdamW), riemannian_of_ours(torch.optim.AdamW)),
    "riemannian_sgd": (riemannian_of_peft(torch.optim.SGD), riemannian_of_ours(torch.optim.SGD)),
}
# PEFT's LoRA-FA takes the factors of an embedding for a pair to project.
NO_EMBEDDING = ("lora_fa",)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_peft(name, fused, monkeypatch):
    from peft.optimizers import lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    theirs, mine = OPTIMIZERS[name]
    targets = ["wide", "tall", "square"] + ["table"] * (name not in NO_EMBEDDING)
    options = {"modules_to_save": ["norm"], "rank_pattern": {"tall": 2}, "bias": "lora_only"}
    if name == "lora_fa":  # what it would call a parameter that is not LoRA's is not to be had there
        options = {"rank_pattern": {"tall": 2}}
    one = peft_model(target_modules=targets, **options)
    other = copy.deepcopy(one)
    if fused:
        accelerate(other)
    train(one, theirs(one))
    before = {n: p.detach().clone() for n, p in other.named_parameters()}
    train(other, mine(other))
    assert any(not torch.equal(before[n], p) for n, p in other.named_parameters())
    assert_same(other, one)
