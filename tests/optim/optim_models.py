"""Small models with adapters, ours and PEFT's, and steps on them."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRAConfig, accelerate, apply_lora


class Net(nn.Module):
    """An embedding, a norm and linears, tall, wide and square."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.norm = nn.LayerNorm(12)
        self.wide = nn.Linear(12, 20)
        self.tall = nn.Linear(20, 9)
        self.square = nn.Linear(9, 9, bias=False)

    def forward(self, tokens):
        return self.square(torch.tanh(self.tall(torch.tanh(self.wide(self.norm(self.table(tokens)))))))


def net(dtype=torch.float64):
    torch.manual_seed(3)
    return Net().to(dtype)


def ours(dtype=torch.float64, **options):
    """A model of `apply_lora`, its factors all away from zero unless `init_lora_weights` says otherwise."""
    defaults = dict(r=4, lora_alpha=6, target_modules=["wide", "tall", "square"], init_lora_weights=False)
    return apply_lora(net(dtype), LoRAConfig(**(defaults | options)))


def peft(dtype=torch.float64, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    defaults = dict(r=4, lora_alpha=6, target_modules=["wide", "tall", "square"], init_lora_weights=False)
    return get_peft_model(net(dtype), LoraConfig(**(defaults | options))).to(dtype)


def accelerated(dtype=torch.float64, **options):
    """PEFT's model with our layers in it."""
    model = peft(dtype, **options)
    accelerate(model)
    return model


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (5, 3), generator=generator)


def loss(model, seed=0):
    target = torch.randn(5, 3, 9, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
    y = model(batch(seed))
    return (y - target.to(y.dtype)).square().mean()


def train(model, optimizer, steps=4, first=0):
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, seed).backward()
        optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other, tolerance=1e-10):
    got, want = values(one), values(other)
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=tolerance, atol=tolerance, msg=name)
