"""VLoRA: an A for each sample by the call, gradients to what made it; the generator and its zero start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_oracle import IN, OUT, WIDE, R, linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import MemVPFFN, VLoRAGenerator, side_inputs


def test_values_and_gradients_also_of_the_generated():
    layer = linear("vlora")
    one, x = layer.adapters["default"], torch.randn(3, 5, IN, dtype=WIDE)
    lora_a = torch.randn(3, R, IN, dtype=WIDE, requires_grad=True)
    with side_inputs(layer, vlora_A={"": lora_a}):
        y = layer(x)
    branch = torch.einsum("bti,bri,or->bto", x, lora_a, one.lora_B)
    want = F.linear(x, layer.weight, layer.bias) + 6 / R * branch
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    grads = [torch.autograd.grad(out, [lora_a, one.lora_B], dy) for out in (y, want)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


class _Watch(TorchDispatchMode):
    """How many operations ran, and how large the largest result was."""

    count, size = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.size = max(self.size, one.numel())
        return out


def test_no_loop_over_samples_and_no_weight_for_each():
    """VLoRA's A of each sample, and MemVP's keys and values, forward and backward."""
    layer, counts = linear("vlora"), {}
    memory = MemVPFFN(nn.Identity()).double().eval()
    for samples in (2, 40):
        x = torch.randn(samples, 3, IN, dtype=WIDE, requires_grad=True)
        lora_a = torch.randn(samples, R, IN, dtype=WIDE, requires_grad=True)
        keys, values = (torch.randn(samples, R, IN, dtype=WIDE, requires_grad=True) for _ in range(2))
        with _Watch() as seen, side_inputs(layer, vlora_A={"": lora_a}):
            layer(x).sum().backward()
        with _Watch() as other, side_inputs(memory, memory=(keys, values)):
            memory(x).sum().backward()
        assert max(seen.size, other.size) < samples * IN * OUT
        counts[samples] = (seen.count, other.count)
    # A copy more or less follows from the layout.
    assert all(many - few < 4 for few, many in zip(counts[2], counts[40], strict=True))


def test_what_the_call_lacks_is_named():
    layer, x = linear("vlora"), torch.randn(3, 5, IN, dtype=WIDE)
    with pytest.raises(ValueError, match="call: expected 'vlora_A'"):
        layer(x)
    for given in ({}, {"": torch.randn(3, R, IN + 1, dtype=WIDE)}):
        with (
            side_inputs(layer, vlora_A=given),
            pytest.raises(ValueError, match=r"vlora_A: expected \[samples, 4, 12\]"),
        ):
            layer(x)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(IN, IN), "v": nn.Linear(IN, IN)}) for _ in range(4)
        )

    def forward(self, x):
        for block in self.layers:
            x = x + block["v"](torch.tanh(block["q"](x)))
        return x


def test_generator_and_model():
    torch.manual_seed(0)
    model = Blocks()
    x, features = torch.randn(2, 5, IN), torch.randn(2, 7, 16)
    want = model(x)
    targets = [f"layers.{i}.{kind}" for i in (1, 3) for kind in "qv"]
    apply_lora(model, LoRAConfig(r=R, lora_alpha=R, method="vlora", target_modules=targets))
    generator = VLoRAGenerator(model, vision_width=16, tokens=7, width=8, depth=2, heads=2)
    made = generator(features)
    assert set(made) == set(targets) and all(a.shape == (2, R, IN) for a in made.values())
    assert len(generator.decoders) == 2  # one a kind
    with side_inputs(model, vlora_A=made):
        y = model(x)
    torch.testing.assert_close(y, want)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    with side_inputs(model, vlora_A=generator(features)):
        model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())
    with pytest.raises(ValueError, match=r"features: expected \[samples, 7, 16\], got \(2, 6, 16\)"):
        generator(features[:, :6])
    with pytest.raises(ValueError, match="model: expected layers with a vlora adapter 'default'"):
        VLoRAGenerator(Blocks(), vision_width=16, tokens=7)
