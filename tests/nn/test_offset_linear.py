"""Bases with an offset for each group: their numbers, QA-LoRA's exact merge, ICQ's entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import OffsetLinear
from lora_kernels.quant import icq_quantize, quantize_int4
from lora_kernels.quant.grouped import int4_values, nf4_entropy

IN, OUT, GROUP = 128, 24, 32


def linear():
    torch.manual_seed(0)
    return nn.Linear(IN, OUT)


def config(**given):
    return LoRAConfig(**{"r": 4, "method": "qalora", "method_options": {"group_size": GROUP}, **given})


def test_int4_numbers():
    weight = linear().weight
    codes, scales, offsets = quantize_int4(weight, GROUP)
    assert codes.shape == (OUT, IN // 2) and scales.shape == offsets.shape == (OUT, IN // GROUP)
    for o, at in ((0, 0), (5, 3)):
        part = weight[o, at * GROUP : (at + 1) * GROUP].detach()
        alpha = (part.max() - part.min()) / 15
        q = torch.round((part - part.min()) / alpha)
        assert torch.equal(int4_values(codes)[o, at * GROUP : (at + 1) * GROUP].float(), q)
        assert (alpha * q + part.min() - part).abs().max() <= alpha * 0.501


@pytest.mark.parametrize("kind", ["int4", "icq"])
def test_is_the_linear_of_its_dense_weight_and_keeps_no_dense_one(kind):
    layer = getattr(OffsetLinear, kind)(linear(), 32)
    x = torch.randn(2, 5, IN, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert max(saved) < OUT * IN
    want = F.linear(x, layer.dense(), layer.bias)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    grads = [torch.autograd.grad(out, x, dy)[0] for out in (y, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int4", "icq"])
def test_qalora_merges_exactly_and_changes_no_code(kind):
    layer = getattr(OffsetLinear, kind)(linear(), GROUP).adapt(config())
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "adapter.lora_A",
        "adapter.lora_B",
    }
    nn.init.normal_(layer.adapter.lora_B)
    codes = layer.core.codes.clone()
    scales, x, before = layer.core.scales.clone(), torch.randn(7, IN), layer.dense()
    delta, by_group = layer.adapter.delta().detach(), layer.adapter.by_group().detach()
    zeros = layer.zeros if kind == "int4" else None
    y = layer(x)
    layer.merge()
    assert layer.adapter is None
    assert torch.equal(layer.core.codes, codes) and torch.equal(layer.core.scales, scales)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense(), before + delta, rtol=1e-4, atol=1e-5)
    if zeros is not None:
        torch.testing.assert_close(layer.zeros, zeros - by_group / scales, rtol=1e-4, atol=1e-4)


def test_calibrated_codes_have_more_entropy():
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(64, 256) + 0.01 * torch.randn(64, 4).repeat_interleave(64, 1)
    blocks = weight.view(64, 4, 64)
    _, offsets = icq_quantize(weight, count=20)
    ours = nf4_entropy(blocks - offsets[..., None])
    middle = nf4_entropy(blocks - blocks.median(-1).values[..., None])
    assert (ours >= middle).all() and ours.mean() > nf4_entropy(blocks).mean() + 0.1


def test_the_core_of_an_icq_base_takes_adapters_of_any_method():
    model = nn.Sequential(OffsetLinear.icq(linear(), 64, count=2))
    x = torch.randn(3, IN)
    want = model(x)
    apply_lora(model, LoRAConfig(r=8, method="ir_qlora", target_modules=["core"]))
    torch.testing.assert_close(model(x), want)
    nn.init.normal_(model[0].core.adapters["default"].lora_B)
    branch = x @ model[0].core.adapters["default"].delta().T
    torch.testing.assert_close(model(x), want + branch, rtol=1e-4, atol=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="K a multiple of an even group, got"):
        OffsetLinear.int4(linear(), 48)
    layer = OffsetLinear.int4(linear(), GROUP)
    for bad, message in (
        (config(method="lora", method_options={}), "config: expected one qalora"),
        (config(method_options={"group_size": 64}), "group_size: expected the base's 32"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.adapt(bad)
        assert layer.adapter is None
    with pytest.raises(ValueError, match="core: expected Int4Codes, got QuantizedLinear"):
        _ = OffsetLinear.icq(linear(), 32, count=1).zeros
