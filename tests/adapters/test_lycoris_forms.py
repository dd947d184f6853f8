"""LoHa and LoKr against PEFT's, and against dense expressions with their gradients."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from cases import shake
from torch import nn

from lora_kernels import load_adapter, save_adapter
from lora_kernels.adapters import LoRAConfig, make
from lora_kernels.adapters.structured.lokr import divisors
from lora_kernels.nn import LoRAConv2d, LoRALinear, apply_lora

WIDE = torch.float64
SIZES = (12, 18)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.conv = nn.Linear(*SIZES), nn.Conv2d(4, 6, 3)

    def forward(self, x, image):
        return self.up(x).sum() + self.conv(image).square().sum()


def net():
    torch.manual_seed(0)
    return Net().to(WIDE)


def inputs():
    torch.manual_seed(1)
    return torch.randn(5, SIZES[0], dtype=WIDE), torch.randn(2, 4, 5, 5, dtype=WIDE)


CONFIGS = {
    "loha": [peft.LoHaConfig(r=1, alpha=3), peft.LoHaConfig(r=4, alpha=3)],
    "lokr": [
        peft.LoKrConfig(r=1, alpha=3),
        peft.LoKrConfig(r=1, alpha=3, decompose_factor=2, decompose_both=True),
        peft.LoKrConfig(r=8, alpha=3),
    ],
}
CASES = [(method, i) for method, configs in CONFIGS.items() for i in range(len(configs))]


@pytest.mark.parametrize("method,case", CASES)
def test_files_both_ways_with_values_and_gradients(method, case, tmp_path):
    config = copy.deepcopy(CONFIGS[method][case])
    config.target_modules = ["up", "conv"]
    theirs = shake(peft.get_peft_model(net(), config).to(WIDE))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(net(), tmp_path / "theirs")
    losses = [model(*inputs()) for model in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    want = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(got) == len(want) > 0
    for name, grad in got.items():
        at, _, parameter = name.partition(".adapters.default.")
        torch.testing.assert_close(grad, want[f"base_model.model.{at}.{parameter}.default"])
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    torch.testing.assert_close(again(*inputs()), losses[1].detach())


@pytest.mark.parametrize("r", [1, 3])
def test_loha_is_the_product_of_two_products_on_both_its_paths(r):
    layer = shake(LoRALinear(*SIZES, r=r, method="loha", dtype=WIDE))
    adapter, x = layer.adapters["default"], inputs()[0]
    assert adapter.plain == (r == 1)
    tensors = [adapter.hada_w1_a, adapter.hada_w1_b, adapter.hada_w2_a, adapter.hada_w2_b]
    w1_a, w1_b, w2_a, w2_b = tensors
    dense = layer.weight + 8 / r * (w1_a @ w1_b) * (w2_a @ w2_b)
    want = nn.functional.linear(x, dense, layer.bias)
    torch.testing.assert_close(layer(x), want)
    grads = [torch.autograd.grad(y.square().sum(), tensors) for y in (layer(x), want)]
    for got, one in zip(*grads, strict=True):
        torch.testing.assert_close(got, one)
    assert sum(t.numel() for t in tensors) == 2 * r * sum(SIZES)


def test_lokr_of_a_linear_is_a_kronecker_product():
    layer = shake(LoRALinear(*SIZES, r=2, method="lokr", method_options={"decompose_factor": 2}, dtype=WIDE))
    adapter, x = layer.adapters["default"], inputs()[0]
    tensors = list(adapter.parameters())
    assert [tuple(t.shape) for t in tensors] == [(2, 2), (9, 2), (2, 6)]
    delta = 4 * torch.kron(tensors[0], tensors[1] @ tensors[2])
    want = nn.functional.linear(x, layer.weight + delta, layer.bias)
    torch.testing.assert_close(layer(x), want)
    grads = [torch.autograd.grad(y.square().sum(), tensors) for y in (layer(x), want)]
    for got, one in zip(*grads, strict=True):
        torch.testing.assert_close(got, one)


def test_of_a_convolution():
    for method in ("loha", "lokr"):
        layer = shake(LoRAConv2d(4, 6, 3, r=1, method=method, dtype=WIDE))
        image = inputs()[1]
        want = nn.functional.conv2d(image, layer.merged_weight(), layer.bias)
        torch.testing.assert_close(layer(image), want)
        assert not torch.equal(layer.merged_weight(), layer.weight)


@pytest.mark.parametrize("size", [1, 7, 12, 96, 127, 128, 250, 360, 512, 640, 1024])
@pytest.mark.parametrize("factor", [-1, 2, 4, 5, 8, 16])
def test_divisors_are_pefts(size, factor):
    assert divisors(size, factor) == tuple(peft.tuners.lokr.layer.factorization(size, factor))


def test_sizes_by_name():
    model = net()
    options = {"sizes": {"up": [9, 3]}}
    apply_lora(model, LoRAConfig(r=1, method="lokr", target_modules=["up"], method_options=options))
    shapes = [tuple(p.shape) for p in model.up.adapters["default"].parameters()]
    assert shapes == [(9, 3), (2, 1), (1, 4)]
    options = {"sizes": {"up": [5, 3]}}
    with pytest.raises(ValueError, match=r"sizes: up: expected divisors of 18 and 12, got \[5, 3\]"):
        apply_lora(net(), LoRAConfig(method="lokr", target_modules=["up"], method_options=options))


def test_bad_options():
    for factor, message in ((0, "expected a number above 0, or -1, got 0"), (-2, "expected at least -1")):
        config = LoRAConfig(method="lokr", method_options={"decompose_factor": factor})
        with pytest.raises(ValueError, match=f"decompose_factor: {message}"):
            make(8, 8, config)
    model = net()
    with pytest.raises(ValueError, match="method_options: loha takes none, got 'n'"):
        apply_lora(model, LoRAConfig(method="loha", target_modules=["up"], method_options={"n": 1}))
