"""ExPLoRA: what trains, and the plain model afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels.schedules import apply_explora, merge_and_restart


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        return x + self.out(torch.tanh(self.q_proj(h) * self.k_proj(h)) + self.v_proj(h))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def test_what_trains_is_blocks_norms_and_factors():
    model = Encoder()
    assert apply_explora(model, model.blocks, unfreeze=[-1], r=2) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if name.startswith("blocks.2.") or "norm" in name or "lora_" in name
    }
    factors = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert factors == 2 * 2 * 2 * (8 + 8)  # two blocks, q and v, r


def test_the_count_of_the_paper():
    """ViT-L, all but the last of 24 blocks, r = 64: 18.7 million numbers."""
    width, r = 1024, 64
    block = 12 * width**2 + 13 * width
    assert 23 * 2 * r * 2 * width + block + (23 * 2 + 1) * 2 * width == pytest.approx(18.72e6, rel=1e-3)


def test_afterwards_it_is_the_same_model_without_adapters():
    model = Encoder()
    want = {name: type(module) for name, module in model.named_modules()}
    apply_explora(model, model.blocks, r=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
    x = torch.randn(2, 5, 4)
    y = model(x)
    assert merge_and_restart(model) is model
    torch.testing.assert_close(model(x), y)
    assert {name: type(module) for name, module in model.named_modules()} == want
    assert all(p.requires_grad for p in model.parameters())


def test_bad_input_changes_nothing():
    model = Encoder()
    for given, message in (
        ({"unfreeze": [3]}, "unfreeze: expected numbers of the 3 blocks, got 3"),
        ({"targets": ["query"]}, "targets: expected ends of names of linears"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_explora(model, model.blocks, **given)
    with pytest.raises(ValueError, match=r"blocks\[0\]: expected a module of the model, got Block"):
        apply_explora(model, [Block()])
    assert all(p.requires_grad for p in model.parameters())
