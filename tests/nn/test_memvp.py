"""MemVP: the branch is so many more hidden units, texts start at the model, images reach the projector."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.nn import MemVPFFN, MemVPMemory, apply_memvp, side_inputs

WIDTH, ENTRIES, VISION, WIDE = 8, 6, 5, torch.float64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.SiLU(), nn.Linear(12, WIDTH))

    def forward(self, x):
        return x + self.mlp(x)


def new_model():
    torch.manual_seed(0)
    model, memory = nn.Sequential(Block(), Block()).to(WIDE), MemVPMemory(WIDTH, ENTRIES, VISION, 4).to(WIDE)
    return model, memory, torch.randn(2, 3, WIDTH, dtype=WIDE)


def test_texts_start_at_the_model():
    model, memory, x = new_model()
    want = model(x)
    apply_memvp(model, ["mlp"])
    assert sum(isinstance(one, MemVPFFN) for one in model.modules()) == 2
    assert not any(p.requires_grad for p in model.parameters())
    with side_inputs(model, memory=memory(samples=2)):
        assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match="call: expected 'memory'"):
        model(x)


def test_is_more_hidden_units_with_every_gradient():
    model, memory, x = new_model()
    nn.init.normal_(memory.values)
    ffn = MemVPFFN(model[0].mlp, 0.3, dropout=0.5).eval()
    tokens = torch.randn(2, 4, VISION, dtype=WIDE)
    seen = 0.01 * memory.up(F.silu(memory.down(tokens)))
    seen = torch.cat([seen, torch.zeros(2, ENTRIES - 4, WIDTH, dtype=WIDE)], 1)
    first, _, last = model[0].mlp
    wanted = []
    for b in range(2):  # a wider plain FFN for each sample
        up = torch.cat([first.weight, (seen + memory.keys)[b]])
        bias = F.pad(first.bias, (0, ENTRIES))
        down = torch.cat([last.weight, 0.3 * (seen + memory.values)[b].T], 1)
        wanted.append(F.linear(F.silu(F.linear(x[b], up, bias)), down, last.bias))
    want = torch.stack(wanted)
    with side_inputs(ffn, memory=memory(tokens)):
        y = ffn(x)
    torch.testing.assert_close(y, want)
    dy, leaves = torch.randn_like(y), list(memory.parameters())
    grads = [torch.autograd.grad(out, leaves, dy) for out in (y, want)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_parameters():
    memory = MemVPMemory(WIDTH, ENTRIES, VISION, 4)
    assert (
        sum(p.numel() for p in memory.parameters())
        == VISION * 4 + 4 + 4 * WIDTH + WIDTH + 2 * ENTRIES * WIDTH
    )


def test_bad_input():
    model, memory, x = new_model()
    with pytest.raises(ValueError, match="targets: expected the end of a module's name, got 'ffn'"):
        apply_memvp(model, ["mlp", "ffn"])
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"tokens: expected \[samples, up to 6, 5\], got shape \(2, 7, 5\)"):
        memory(torch.randn(2, 7, VISION, dtype=WIDE))
    apply_memvp(model, ["mlp"])
    with (
        side_inputs(model, memory=memory(samples=3)),
        pytest.raises(ValueError, match="memory: expected keys"),
    ):
        model(x)
