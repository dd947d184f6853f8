"""``torch.nn.DataParallel``, by what it makes for each card: PEFT's layers compute, ours refuse."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, accelerate, apply_lora, quantize_base


@pytest.fixture
def replicas(monkeypatch):
    """``replicate`` for two cards that are none."""
    module = sys.modules[nn.parallel.replicate.__module__]

    def broadcast(tensors, devices, detach=False):
        return [[one.detach() if detach else one.clone() for one in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return lambda model: module.replicate(model, [0, 1])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.a(x) * self.b(x)


LAYERS = {
    "linear": lambda: Two(),
    "quantised": lambda: quantize_base(Two(), "int8"),
    "convolution": lambda: nn.Sequential(nn.Conv1d(4, 4, 1)),
    "embedding": lambda: nn.Sequential(nn.Embedding(8, 4)),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_ours_name_ddp(replicas, make):
    model = apply_lora(make(), LoRAConfig(r=2, target_modules=".+"))
    with pytest.raises(RuntimeError, match=r"expected DistributedDataParallel .* got torch.nn.DataParallel"):
        replicas(model)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_accelerated_layers_compute_in_each(replicas, options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Two(), peft.LoraConfig(r=2, target_modules=["a", "b"], **options))
    accelerate(model)
    x = torch.randn(3, 32)
    want = model(x)
    want.sum().backward()
    grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}
    model.zero_grad()
    for replica in replicas(model):
        y = replica(x)
        torch.testing.assert_close(y, want)
        (y.sum() / 2).backward()
    for name, grad in grads.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, msg=name)
