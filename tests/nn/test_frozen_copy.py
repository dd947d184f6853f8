"""A frozen copy keeps what the model computed, beside the same base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, quantize_base
from lora_kernels.nn import frozen_copy, set_adapter


def policy(quantised):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)).requires_grad_(False)
    if quantised:
        quantize_base(model, "nf4")
    return apply_lora(model, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def storages(model):
    return {t.untyped_storage().data_ptr() for _, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_it_stays_as_the_policy_learns_and_shares_the_base(quantised):
    model = policy(quantised)
    x = torch.randn(5, 64)
    reference = frozen_copy(model)
    want = model.eval()(x).detach()
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(reference(x), want)
    assert not torch.allclose(model.eval()(x), want)
    base = [model.get_submodule(at) for at in ("0", "2")]
    shared = storages(model) & storages(reference)
    for layer in base:
        own = [t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None]
        assert own and all(t.untyped_storage().data_ptr() in shared for t in own)


def test_its_adapters_are_its_own():
    model = policy(False)
    apply_lora(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False), "other")
    reference = frozen_copy(model)
    set_adapter(model, "other")
    assert reference[0].active == ("default",) and model[0].active == ("other",)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got dict"):
        frozen_copy({})
