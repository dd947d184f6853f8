"""LoRA on GPT-2's ``Conv1D``: the linear on the transposed weight, in every state of the layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, apply_lora, quantize_base
from lora_kernels.adapters import METHODS
from lora_kernels.nn import (
    disable_adapters,
    lora_layers,
    merge_adapters,
    remove_lora,
    side_inputs,
    unmerge_adapters,
)
from lora_kernels.nn.sites import layer_types
from lora_kernels.testing.method_cases import IN, OUT, RANK, case

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

from lora_kernels.nn.transposed import LoRATransposedLinear  # noqa: E402


def new_layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = Conv1D(11, 24).to(dtype)
    nn.init.normal_(base.bias)
    return base, LoRATransposedLinear.from_conv1d(base, r=3, lora_alpha=6, **options)


def shake(*layers):
    """The same random numbers into every parameter of the adapters."""
    for layer in layers:
        generator = torch.Generator().manual_seed(4)
        for parameter in layer.adapters.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def twin(layer, config):
    """A LoRALinear of the same function."""
    linear = nn.Linear(*layer.weight.shape).to(layer.weight.dtype)
    linear.weight.data, linear.bias.data = layer.weight.data.T.clone(), layer.bias.data.clone()
    return LoRALinear.from_linear(linear, config)


@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_are_those_of_the_linear(method):
    config = LoRAConfig(
        **{"r": RANK, "lora_alpha": 6, "lora_dropout": 0.3, **case(method).options}, method=method
    )
    base = Conv1D(OUT, IN).double()
    layer = LoRATransposedLinear.from_conv1d(base, config)
    other, found = twin(layer, config), []
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "weight"}, strict=False)
    other.weight.data = layer.weight.data.T.clone()  # a start may have taken something out of it once more
    shake(layer, other)
    for one in (layer, other):
        x = torch.randn(2, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        side = case(method).side(x)
        torch.manual_seed(2)
        with side_inputs(one, **side):
            y = one(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in one.adapters.parameters() if p.requires_grad)])
    assert len(found[0]) == len(found[1]) > 2
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_weight_is_read_in_place(dtype):
    base, layer = new_layer(dtype)
    assert layer.weight is base.weight and layer.bias is base.bias and isinstance(layer, Conv1D)
    x, kept = torch.randn(9, 24, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert base.weight.data_ptr() in {t.data_ptr() for t in kept}
    torch.testing.assert_close(y, base(x))


@pytest.mark.parametrize("use_dora", (False, True))
def test_merge_unmerge_disable_and_the_way_back(use_dora):
    base, layer = new_layer(use_dora=use_dora)
    shake(layer)
    x, weight = torch.randn(5, 24, dtype=torch.float64), base.weight
    y, plain = layer(x), base(x)
    layer.merge()
    assert layer.weight.shape == (24, 11) and layer.weight.is_contiguous()
    torch.testing.assert_close(layer(x), y)
    with layer.disable_adapters():
        torch.testing.assert_close(layer(x), plain)
    assert torch.equal(layer.state_dict()["weight"], weight)
    merged = layer.to_base(merge=True)
    assert type(merged) is Conv1D
    torch.testing.assert_close(merged(x), y)
    layer.unmerge()
    back = layer.to_base()
    assert layer.weight is weight and type(back) is Conv1D and back.weight is weight
    assert vars(back).keys() == vars(base).keys()
    assert torch.equal(back(x), plain)


def test_several_adapters_copies_and_words():
    _, layer = new_layer(lora_dropout=0.5)
    layer.add_adapter("other", LoRAConfig(r=2, init_lora_weights=False))
    layer.set_adapter(("default", "other"))
    shake(layer)
    x = torch.randn(5, 24, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.merged_weight().T, layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(x), layer(x))
    assert "in_features=24, out_features=11, active=['default', 'other']" in repr(layer)
    mean = layer.train()(x[:1].expand(20000, -1))
    assert ((mean.mean(0) - expected[0]).abs() <= 5 * mean.std(0) / 20000**0.5 + 1e-9).all()


def test_reset_draws_all_anew():
    base, layer = new_layer()
    shake(layer)
    layer.reset_parameters()
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base(x))
    assert not base.bias.any()


def test_bad_arguments():
    _, layer = new_layer()
    with pytest.raises(ValueError, match="x: expected last dimension 24"):
        layer(torch.ones(2, 11, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x: expected torch\.float64"):
        layer(torch.ones(2, 24))
    with pytest.raises(TypeError, match="LoRATransposedLinear: use from_conv1d"):
        LoRATransposedLinear(2, 3)
    with pytest.raises(TypeError, match=r"conv1d: expected an nn\.Conv1D, got Linear"):
        LoRATransposedLinear.from_conv1d(nn.Linear(2, 3))


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


@torch.no_grad()
def test_in_a_model(gpt2):
    tokens = torch.arange(14).view(2, 7)
    before = {name: (type(m), m._parameters.get("weight")) for name, m in gpt2.named_modules()}
    plain = gpt2(input_ids=tokens).logits
    apply_lora(gpt2, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    layers = lora_layers(gpt2)
    assert len(layers) == 2 * 4 and {type(layer) for layer in layers.values()} == {LoRATransposedLinear}
    adapted = gpt2(input_ids=tokens).logits
    assert not torch.allclose(adapted, plain, atol=1e-2)
    with disable_adapters(gpt2):
        torch.testing.assert_close(gpt2(input_ids=tokens).logits, plain)
    merge_adapters(gpt2)
    torch.testing.assert_close(gpt2(input_ids=tokens).logits, adapted, rtol=0, atol=1e-4)
    unmerge_adapters(gpt2)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert gpt2.generate(input_ids=tokens, **options).shape == (2, 10)
    remove_lora(gpt2)
    for name, module in gpt2.named_modules():
        kind, weight = before[name]
        assert type(module) is kind and module._parameters.get("weight") is weight
    assert torch.equal(gpt2(input_ids=tokens).logits, plain)


def test_what_has_no_transposed_form_says_so(gpt2):
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.attn\.c_attn' is of type Conv1D"):
        quantize_base(gpt2, "nf4", ["c_attn"])


def test_types_are_known_where_transformers_is_loaded():
    assert layer_types()[Conv1D] is LoRATransposedLinear
