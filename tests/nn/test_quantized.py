"""Linears with a quantised base, as modules and in models."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import lora_kernels.nn.groups as groups
from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    QuantizedLinear,
    apply_lora,
    dequantize,
    load_adapter,
    quantize_base,
    save_adapter,
    use_backend,
)
from lora_kernels.nn import (
    QuantizedLoRALinear,
    disable_adapters,
    layer_groups,
    lora_state_dict,
    merge_adapters,
    mixed_adapters,
    remove_lora,
)

FORMATS = {"nf4": {}, "int8": {}, "fp8": {"per_tensor": True}}


def rand(*shape):
    """Wide, so that an order of summation shows nowhere."""
    return torch.randn(*shape, dtype=torch.float64)


def model():
    return nn.Sequential(nn.Linear(70, 33), nn.GELU(), nn.Linear(33, 8, bias=False)).double()


def qlora(format="nf4", **options):
    made = quantize_base(model(), format, **options)
    return apply_lora(made, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def dense_twin(made):
    """The same model over dense weights: what the codes stand for."""
    twin = model()
    for index in (0, 2):
        twin[index].weight.data.copy_(dequantize(made[index].weight))
        if made[index].bias is not None:
            twin[index].bias = made[index].bias
    if isinstance(made[0], LoRALinear):
        apply_lora(twin, LoRAConfig(r=4, target_modules="all-linear"))
        twin.load_state_dict(lora_state_dict(made), strict=False)
    return twin


@pytest.mark.parametrize(("format", "options"), FORMATS.items())
def test_quantize_base(format, options):
    plain = model()
    x = rand(5, 70)
    before = plain(x)
    bias = plain[0].bias
    assert quantize_base(plain, format, **options) is plain
    assert type(plain[0]) is QuantizedLinear and plain[0].bias is bias
    torch.testing.assert_close(plain(x), dense_twin(plain)(x))
    assert (plain(x) - before).abs().max() < 0.3 * before.abs().max()
    assert not [name for name, _ in plain.named_parameters() if "weight" in name]


@pytest.mark.parametrize("format", FORMATS)
def test_training_equals_that_over_the_dense_weight(format):
    made = qlora(format)
    twin = dense_twin(made)
    x = rand(3, 5, 70).requires_grad_()
    y = made(x)
    y.square().sum().backward()
    got = x.grad
    x.grad = None
    expected = twin(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(got, x.grad)
    others = dict(twin.named_parameters())
    trained = [(name, p) for name, p in made.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    for name, parameter in trained:
        torch.testing.assert_close(parameter.grad, others[name].grad)


def test_adapters_stay_when_the_base_is_quantised_later():
    dense = apply_lora(model(), LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapter = dense[0].adapters["default"]
    quantize_base(dense, "int8")
    assert type(dense[0]) is QuantizedLoRALinear and dense[0].adapters["default"] is adapter
    x = rand(2, 70)
    torch.testing.assert_close(dense(x), dense_twin(dense)(x))
    layers = list(dense)
    assert list(quantize_base(dense, "nf4")) == layers  # what is quantised stays


def test_from_linear_disable_and_several_adapters():
    base = QuantizedLinear.from_linear(nn.Linear(70, 12).double())
    layer = LoRALinear.from_linear(base, r=2, init_lora_weights=False)
    assert isinstance(layer, QuantizedLoRALinear) and layer.codes is base.codes
    x = rand(3, 70)
    y = layer(x)
    assert not torch.allclose(y, base(x))
    with disable_adapters(layer):
        assert torch.equal(layer(x), base(x))
    layer.add_adapter("other", LoRAConfig(r=3, init_lora_weights=False))
    layer.set_adapter(("default", "other"))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.merged_weight(), layer.bias))
    assert isinstance(layer.to_linear(), QuantizedLinear)
    assert torch.equal(layer.to_linear()(x), base(x))
    with pytest.raises(TypeError, match="got QuantizedLoRALinear"):
        LoRALinear.from_linear(layer, r=2)


def test_lora_xs_starts_from_what_the_codes_stand_for():
    base = QuantizedLinear.from_linear(nn.Linear(32, 16), "int8")
    layer = LoRALinear.from_linear(base, r=2, method="lora_xs")
    dense = LoRALinear.from_linear(base.to_linear(), r=2, method="lora_xs")
    torch.testing.assert_close(layer.adapters["default"].lora_A, dense.adapters["default"].lora_A)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_a_move_of_dtype_leaves_the_codes(dtype):
    layers = [qlora("nf4", double_quant=True), qlora("fp8")]
    for layer in layers:
        before = {name: b.clone() for name, b in layer.named_buffers() if b is not None}
        layer.to(dtype)
        after = dict(layer.named_buffers())
        for name, buffer in before.items():
            assert after[name].dtype == buffer.dtype and torch.equal(after[name], buffer), name
        assert layer(torch.randn(2, 70, dtype=dtype)).dtype == dtype
    assert layers[0].to("meta")[0].codes.device.type == "meta"


def test_x_of_any_dtype_on_one_layer():
    layer = quantize_base(model(), "int8")[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert layer(torch.randn(2, 70, dtype=dtype)).dtype == dtype


def test_state_dict_pickle_and_copies():
    made = qlora("nf4", double_quant=True)
    x = rand(2, 70)
    y = made(x)
    other = qlora("nf4", double_quant=True)
    assert not torch.equal(other(x), y)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), y)
    assert "0.codes" in made.state_dict() and "0.weight" not in made.state_dict()
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), y) and twin[0].codes is not made[0].codes


def test_merging_is_refused_and_gives_dense_linears_on_removal():
    made = qlora("int8")
    x = rand(4, 70)
    y = made(x)
    with pytest.raises(RuntimeError, match="cannot merge into a quantised weight"):
        merge_adapters(made)
    merged = remove_lora(copy.deepcopy(made), merge=True)
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), y)
    plain = remove_lora(made)
    assert type(plain[0]) is QuantizedLinear and plain[0].weight.format == "int8"


def test_a_transformer_layer_calls_its_linears():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    quantize_base(layer, "int8", ["linear1", "linear2"])
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x).detach())


class _Pair(nn.Module):
    """Two linears on one x: a group, dense or quantised."""

    def __init__(self):
        super().__init__()
        self.q, self.k = (nn.Linear(32, 16, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.q(x) + self.k(x)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("formats", ({"k": "int8"}, {"q": "nf4", "k": "nf4"}), ids=str)
def test_groups_of_quantised_layers(formats, dtype, monkeypatch):
    calls, real = [], groups.fused_group
    monkeypatch.setattr(groups, "fused_group", lambda members: (calls.append(1), real(members))[1])
    config = LoRAConfig(r=2, target_modules=["q", "k"], init_lora_weights=False, lora_dropout=0.3)
    pair = apply_lora(_Pair(), config)
    for name, format in formats.items():
        quantize_base(pair, format, [name])
    assert layer_groups(pair) == [("q", "k")]
    alone, found = copy.deepcopy(pair), []
    groups.ungroup_layers(alone)
    x = rand(40, 32).to(torch.float64 if len(formats) == 1 else dtype)  # a dense member takes its own dtype
    for one in (pair, alone):
        torch.manual_seed(3)
        v = x.clone().requires_grad_()
        y = one(v)
        y.square().sum().backward()
        found.append([y, v.grad, *(p.grad for p in one.parameters() if p.grad is not None)])
    assert calls == [1]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_batches_of_mixed_adapters():
    made = qlora("int8")
    made[0].add_adapter("other", LoRAConfig(r=3, init_lora_weights=False))
    x = rand(3, 70)
    with mixed_adapters(made, ["other", "__base__", "default"]):
        got = made(x)
    alone = []
    for i, name in enumerate(("other", None, "default")):
        made[0].set_adapter([name] if name in made[0].adapters else [])
        made[2].set_adapter([name] if name in made[2].adapters else [])
        alone.append(made(x[i : i + 1]))
    torch.testing.assert_close(got, torch.cat(alone))


def test_checkpoints_come_from_and_go_to_a_quantised_base(tmp_path):
    made = qlora("nf4")
    save_adapter(made, tmp_path)
    other = quantize_base(model(), "nf4")
    load_adapter(other, tmp_path)
    assert type(other[0]) is QuantizedLoRALinear
    for name, parameter in lora_state_dict(made).items():
        torch.testing.assert_close(lora_state_dict(other)[name], parameter)


def test_hooks_come_along_and_stay():
    seen = []
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda *args: seen.append(type(args[0])))
    layer = LoRALinear.from_linear(QuantizedLinear.from_linear(linear), r=2)
    for one in (layer, layer.to_linear(), layer.to_linear(merge=True)):
        one(torch.randn(2, 8))
    assert seen == [QuantizedLoRALinear, QuantizedLinear, nn.Linear]


def test_compiles_whole():
    made = qlora()
    x = rand(3, 70)
    with use_backend("reference"):
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), made(x))


def test_errors():
    with pytest.raises(TypeError, match=r"model: expected an nn.Module"):
        quantize_base(3)
    with pytest.raises(ValueError, match=r"matches no nn\.Linear"):
        quantize_base(model(), "nf4", ["none"])
    untouched = model()
    with pytest.raises(ValueError, match="format: expected one of"):
        quantize_base(untouched, "int3")
    assert type(untouched[0]) is nn.Linear
    merged = apply_lora(model(), LoRAConfig(r=2, target_modules="all-linear"))
    merge_adapters(merged)
    with pytest.raises(ValueError, match="0: layer: default is merged"):
        quantize_base(merged)
    with pytest.raises(ValueError, match="use_dora: DoRA needs"):
        apply_lora(quantize_base(model()), LoRAConfig(r=2, target_modules="all-linear", use_dora=True))
    with pytest.raises(ValueError, match="use_dora: DoRA needs"):
        quantize_base(apply_lora(model(), LoRAConfig(r=2, target_modules="all-linear", use_dora=True)))
    with pytest.raises(TypeError, match="layer: expected a LoRALinear, got Linear"):
        QuantizedLoRALinear.from_dense(nn.Linear(2, 2))
    dora = LoRALinear(70, 33, r=2, use_dora=True).adapters["default"]
    with pytest.raises(ValueError, match="use_dora: DoRA needs"):
        qlora()[0].add_adapter("dora", dora)
    with pytest.raises(TypeError, match=r"expected a plain nn\.Linear"):
        QuantizedLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match="weight: expected a QuantizedWeight"):
        QuantizedLinear(torch.ones(2, 2))
    with pytest.raises(ValueError, match="x: expected last dimension 70"):
        qlora()(torch.ones(2, 5))
    with pytest.raises(TypeError, match="use LoRALinear"):
        QuantizedLoRALinear(2, 2)
