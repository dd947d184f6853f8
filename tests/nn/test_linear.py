from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import LoRALinear

IN, OUT, RANK = 16, 12, 4


def new_layer(*, adapters=1, **options) -> LoRALinear:
    """A layer with nonzero adapters "default", "a1", "a2", …, all active."""
    torch.manual_seed(0)
    layer = LoRALinear(IN, OUT, r=RANK, lora_alpha=6, **options)
    for i in range(1, adapters):
        dropout = options.get("lora_dropout", 0.0)
        layer.add_adapter(f"a{i}", LoRAConfig(r=RANK + i, lora_alpha=3 * i, lora_dropout=dropout))
    layer.set_adapter(list(layer.adapters))
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.normal_(std=0.5)
    return layer


def dense(layer: LoRALinear, x: torch.Tensor, names=None) -> torch.Tensor:
    names = layer.active if names is None else names
    weight = layer.base_weight.double() + sum(layer.adapters[n].delta(torch.float64) for n in names)
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), weight, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0, 3)])
def test_leading_dimensions(lead, bias):
    layer = new_layer(bias=bias, dtype=torch.float64)
    x = torch.randn(*lead, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-12, atol=1e-12)


def test_from_linear_shares_the_parameters_and_keeps_hooks():
    linear = nn.Linear(IN, OUT).eval()
    seen = []
    handle = linear.register_forward_hook(lambda *_: seen.append(1))
    layer = LoRALinear.from_linear(linear, r=2)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert not layer.training and not layer.adapters["default"].training
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), linear(x))
    assert len(seen) == 2
    handle.remove()
    layer(x)
    assert len(seen) == 2
    assert "adapters" not in linear._modules


@pytest.mark.parametrize("linear", [nn.Identity(), nn.MultiheadAttention(4, 1).out_proj])
def test_from_linear_refuses_what_calls_its_weight_directly(linear):
    with pytest.raises(TypeError, match="linear: expected an nn"):
        LoRALinear.from_linear(linear)


def test_from_linear_takes_a_config_or_keywords_not_both():
    with pytest.raises(TypeError, match="config"):
        LoRALinear.from_linear(nn.Linear(2, 2), LoRAConfig(), r=2)


@pytest.mark.parametrize("shape", [(3, IN + 1), (IN, 3), (0,)])
def test_wrong_last_dimension_is_named(shape):
    with pytest.raises(ValueError, match=f"x: expected last dimension {IN}"):
        new_layer()(torch.randn(*shape))


def test_wrong_dtype_is_named():
    with pytest.raises(TypeError, match=r"x: expected .*float32.*float64"):
        new_layer()(torch.randn(3, IN, dtype=torch.float64))


@pytest.mark.parametrize("adapters", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_active_adapters_add_up(adapters, training):
    layer = new_layer(adapters=adapters, dtype=torch.float64).train(training)
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == 2 * adapters
    y, want = layer(x), dense(layer, x)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, [x, *trained], dy) for out in (y, want))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_several_active_adapters_are_one_call(monkeypatch):
    from lora_kernels.adapters import update as module

    ranks, fused = [], module.fused
    monkeypatch.setattr(module, "fused", lambda args: ranks.append(args.lora_a.shape[0]) or fused(args))
    layer = new_layer(adapters=3)
    layer(torch.randn(2, IN))
    assert ranks == [RANK + RANK + 1 + RANK + 2]


@pytest.mark.parametrize("adapters", [1, 2])
def test_dropout_acts_in_training_alone_and_is_unbiased(adapters):
    layer = new_layer(adapters=adapters, lora_dropout=0.5).eval()
    x = torch.randn(1, IN)
    exact = layer(x)
    torch.testing.assert_close(exact, dense(layer, x).float(), rtol=1e-5, atol=1e-5)
    layer.train()
    draws = layer(x.expand(20000, IN))
    assert (draws[0] != draws[1]).any()
    spread = draws.std(0) / math.sqrt(20000)
    assert ((draws.mean(0) - exact[0]).abs() < 5 * spread).all()


def test_each_adapter_draws_its_own_mask():
    layer = new_layer(adapters=2, lora_dropout=0.5)
    with torch.no_grad():  # the second undoes the first where their masks agree
        layer.adapters["a1"].lora_A.zero_()[:RANK].copy_(layer.adapters["default"].lora_A)
        layer.adapters["a1"].lora_B.zero_()[:, :RANK].copy_(-layer.adapters["default"].lora_B)
        layer.adapters["a1"].scaling = layer.adapters["default"].scaling
    x = torch.randn(8, IN)
    base = F.linear(x, layer.weight, layer.bias)
    assert (layer(x) - base).abs().max() > 1e-2
    torch.testing.assert_close(layer.eval()(x), base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapters", [1, 2])
def test_checkpointing_with_dropout_draws_the_same_masks(adapters):
    grads = []
    for wrap in (False, True):
        layer = new_layer(adapters=adapters, lora_dropout=0.3)
        x = torch.ones(6, IN, requires_grad=True)
        torch.manual_seed(5)
        y = checkpoint(layer, x, use_reentrant=False) if wrap else layer(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.adapters.parameters())])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_disabled_is_the_base_also_while_merged():
    layer = new_layer(adapters=2)
    x = torch.randn(3, IN)
    base = F.linear(x, layer.weight, layer.bias)
    with layer.disable_adapters():
        assert torch.equal(layer(x), base)
    y = layer(x)
    assert not torch.equal(y, base)
    layer.merge()
    with layer.disable_adapters():
        assert torch.equal(layer(x), base)
    torch.testing.assert_close(layer(x), y)
    layer.enable_adapters(False)
    layer.unmerge()
    assert torch.equal(layer(x), base)


def test_disable_restores_what_was_there_after_an_error():
    layer = new_layer()
    with pytest.raises(KeyError), layer.disable_adapters():
        raise KeyError
    assert layer.enabled


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("dtype,eps", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_merge_rounds_once(adapters, dtype, eps):
    layer = new_layer(adapters=adapters, dtype=dtype)
    deltas = [layer.adapters[n].delta(torch.float64) for n in layer.active]
    exact = layer.weight.double() + sum(deltas)
    before = layer.weight.clone()
    layer.merge()
    assert layer.weight.dtype == dtype
    # Half a unit in the last place, and what float32 loses before.
    bound = exact.abs() * eps + 1e-5
    assert ((layer.weight.double() - exact).abs() <= bound).all()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_merging_leaves_a_tied_weight_alone():
    layer = new_layer()
    other, before = nn.Linear(IN, OUT), layer.weight.clone()
    other.weight = layer.weight
    layer.merge()
    assert torch.equal(other.weight, before)
    layer.unmerge()
    assert layer.weight is other.weight


def test_merged_layers_refuse_what_would_lose_their_base():
    layer = new_layer(adapters=2)
    layer.merge()
    for change in (lambda: layer.set_adapter("a1"), lambda: layer.delete_adapter("a1")):
        with pytest.raises(RuntimeError, match="merged"):
            change()
    layer.add_adapter("waiting", LoRAConfig(r=1))
    assert layer.merged == ("default", "a1")


def test_state_dict_of_a_merged_layer_holds_the_base():
    layer = new_layer()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.merge()
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    layer.load_state_dict(before)
    assert not layer.merged and torch.equal(layer.weight, before["weight"])


def test_moving_while_merged():
    layer = new_layer()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.weight.dtype == torch.float64 and isinstance(layer.weight, nn.Parameter)
    x = torch.randn(2, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, x))


def test_names_are_checked_and_change_nothing():
    layer = new_layer(adapters=2)
    for bad in ("default", "a.b", "", "keys"):
        with pytest.raises(ValueError, match="adapter_name"):
            layer.add_adapter(bad, LoRAConfig())
    with pytest.raises(TypeError, match="adapter_name"):
        layer.add_adapter(3, LoRAConfig())
    for change in (layer.set_adapter, layer.delete_adapter):
        with pytest.raises(ValueError, match="expected one of default, a1, got 'nope'"):
            change("nope")
    assert list(layer.adapters) == ["default", "a1"] and layer.active == ("default", "a1")


def test_only_active_adapters_train_and_deletion_keeps_the_rest():
    layer = new_layer(adapters=3)
    layer.set_adapter("a1")
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "adapters.a1.lora_A",
        "adapters.a1.lora_B",
    }
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), dense(layer, x, ["a1"]).float(), rtol=1e-5, atol=1e-5)
    layer.set_adapter(["a1", "a2"])
    layer.delete_adapter("a1")
    torch.testing.assert_close(layer(x), dense(layer, x, ["a2"]).float(), rtol=1e-5, atol=1e-5)
    layer.set_adapter([])
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_whole_and_apart(clone, merged):
    layer = new_layer(adapters=2)
    if merged:
        layer.merge()
    x = torch.randn(3, IN)
    y, other = layer(x), clone(layer)
    assert torch.equal(other(x), y) and other.merged == layer.merged
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), y)
    other.unmerge()
    assert isinstance(other.weight, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_another_dtype(dtype):
    layer = new_layer().to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(3, IN, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float16: 5e-2, torch.bfloat16: 3e-1}[dtype]
    torch.testing.assert_close(y.double(), dense(layer, x), rtol=tolerance, atol=tolerance)


def test_autocast_computes_in_its_dtype():
    layer = new_layer()
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.adapters.parameters())
    torch.testing.assert_close(y.double(), dense(layer, x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("adapters", [1, 2])
def test_compiles_whole(adapters):
    layer = new_layer(adapters=adapters)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, IN, requires_grad=True)
    y, want = compiled(x), layer(x)
    torch.testing.assert_close(y, want)
    trained = [x, *layer.adapters.parameters()]
    ours, theirs = (torch.autograd.grad(out.sum(), trained) for out in (y, want))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_layers_follow_a_change_of_adapter():
    layer = new_layer(adapters=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, IN)
    for change in (
        lambda: None,
        lambda: layer.set_adapter("a1"),
        lambda: layer.enable_adapters(False),
        lambda: layer.enable_adapters(),
        layer.merge,
        layer.unmerge,
    ):
        change()
        torch.testing.assert_close(compiled(x), layer(x))


def test_functional_call():
    layer = new_layer(dtype=torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64)
    parameters = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, parameters, (x,))
    layer.load_state_dict(parameters)
    assert torch.equal(layer(x), y)


def test_meta_construction_then_reset():
    layer = LoRALinear(IN, OUT, r=RANK, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(3, IN)
    assert layer(x).isfinite().all()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.adapters["default"].lora_A.abs().max() > 0


def test_to_linear_gives_back_the_parameters():
    linear = nn.Linear(IN, OUT)
    layer = LoRALinear.from_linear(linear, r=RANK, init_lora_weights=False)
    x = torch.randn(3, IN)
    back, folded = layer.to_linear(), layer.to_linear(merge=True)
    assert type(back) is nn.Linear and back.weight is linear.weight and back.bias is linear.bias
    assert list(folded.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(folded(x), layer(x))
    assert vars(back).keys() == vars(linear).keys()


def test_repr_says_what_acts():
    assert "active=['default', 'a1']" in repr(new_layer(adapters=2))
    layer = new_layer()
    layer.merge()
    layer.enable_adapters(False)
    assert "disabled, merged=['default']" in repr(layer)
