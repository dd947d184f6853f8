"""Every registered structure through the same invariants. A new one needs no test here; see ``cases.py``."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import IN, OUT, case, new_layer, options, run, shake
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import load_adapter, methods, save_adapter
from lora_kernels.adapters import METHODS, LoRAConfig, LowRank
from lora_kernels.integrations.checkpoint import WEIGHTS, read_weights
from lora_kernels.nn import (
    LoRALinear,
    apply_lora,
    layer_groups,
    lora_state_dict,
    merge_adapters,
    side_inputs,
    unmerge_adapters,
)

every_method = pytest.mark.parametrize("method", sorted(METHODS))


def mergeable(method):
    if not METHODS[method].mergeable:
        pytest.skip(f"{method} makes no one weight of W")


def dense(layer, x):
    weight = layer.weight
    for adapter in layer.adapters.values():
        weight = adapter.merged(weight, layer.weight)
    return F.linear(x, weight, layer.bias)


class Siblings(nn.Module):
    """Three linears, two of which read one x."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(IN, OUT, dtype=torch.float64)
        self.k_proj = nn.Linear(IN, OUT, dtype=torch.float64)
        self.back = nn.Linear(OUT, IN, dtype=torch.float64)

    def forward(self, x):
        return self.back(torch.tanh(self.q_proj(x) + self.k_proj(x)))


def new_model(method, **how):
    torch.manual_seed(0)
    model = Siblings()
    apply_lora(model, LoRAConfig(target_modules="all-linear", **options(method)), **how)
    return model


@every_method
def test_starts_at_the_base(method):
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, dtype=torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64)
    want = base(x)
    layer = LoRALinear.from_linear(base, LoRAConfig(**options(method)))
    error = (run(layer, x, method) - want).abs().max()
    if METHODS[method].zero_start:
        assert error < 1e-12
    else:
        assert 0 < error < 2e-2


@every_method
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_is_the_dense_layer(method, use_rslora):
    mergeable(method)
    layer = shake(new_layer(method, use_rslora=use_rslora))
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    torch.testing.assert_close(run(layer, x, method), dense(layer, x), rtol=1e-12, atol=1e-11)


@every_method
def test_gradients_are_those_of_the_dense_layer(method):
    mergeable(method)
    layer = shake(new_layer(method))
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, OUT, dtype=torch.float64)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert trained
    ours = torch.autograd.grad(run(layer, x, method), [x, *trained], dy)
    theirs = torch.autograd.grad(dense(layer, x), [x, *trained], dy)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert any(grad.abs().max() > 0 for grad in ours[1:])


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_equals_forward_and_unmerge_is_exact(method, dtype):
    layer = shake(new_layer(method, dtype=dtype))
    x = torch.randn(4, IN, dtype=dtype)
    weight, before, y = layer.weight, layer.weight.clone(), run(layer, x, method)
    if not METHODS[method].mergeable:
        with pytest.raises(RuntimeError, match=method):
            layer.merge()
        assert layer.weight is weight and torch.equal(weight, before)
        return
    layer.merge()
    assert layer.weight is not weight
    torch.testing.assert_close(layer(x), y)
    layer.unmerge()
    assert layer.weight is weight
    assert torch.equal(layer.weight, before)
    assert torch.equal(run(layer, x, method), y)


@every_method
def test_state_dict_round_trip(method):
    layer = shake(new_layer(method))
    torch.manual_seed(1)
    other = LoRALinear(IN, OUT, dtype=torch.float64, **options(method))
    x = torch.randn(4, IN, dtype=torch.float64)
    assert not torch.equal(run(layer, x, method), run(other, x, method))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(layer, x, method), run(other, x, method))


@every_method
def test_a_step_moves_what_trains_and_nothing_else(method):
    layer = shake(new_layer(method))
    before = {name: p.clone() for name, p in layer.named_parameters()}
    run(layer, torch.randn(4, IN, dtype=torch.float64), method).square().sum().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
    frozen = METHODS[method].frozen
    for name, parameter in layer.named_parameters():
        trains = name.startswith("adapters.") and name.rpartition(".")[2] not in frozen
        assert parameter.requires_grad == trains, name
        assert torch.equal(parameter, before[name]) != trains, name


@every_method
def test_deepcopy_is_apart(method):
    layer = shake(new_layer(method))
    x = torch.randn(4, IN, dtype=torch.float64)
    other, y = copy.deepcopy(layer), run(layer, x, method)
    assert torch.equal(run(other, x, method), y)
    shake(other)
    other.set_adapter([])
    assert torch.equal(run(layer, x, method), y)


@every_method
def test_no_tensor_keeps_a_larger_one_in_memory(method):
    for name, tensor in new_layer(method).adapters.named_parameters():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@every_method
def test_stacks_with_lora(method):
    layer = new_layer(method)
    layer.add_adapter("second", LoRAConfig(r=3, lora_alpha=1))
    x = torch.randn(4, IN, dtype=torch.float64)
    base = F.linear(x, layer.weight, layer.bias)
    shake(layer)
    layer.set_adapter("second")
    second = layer(x) - F.linear(x, layer.weight, layer.bias)
    layer.set_adapter("default")
    first = run(layer, x, method)
    layer.set_adapter(["default", "second"])
    shake_of_second = layer.adapters["second"]
    assert all(p.requires_grad for p in shake_of_second.parameters())
    if METHODS[method].mergeable:
        torch.testing.assert_close(run(layer, x, method), dense(layer, x), rtol=1e-12, atol=1e-11)
    else:
        torch.testing.assert_close(run(layer, x, method), first + second, rtol=1e-12, atol=1e-11)
    assert base.shape == first.shape


@every_method
def test_trains_in_full_float32_on_a_half_precision_base(method):
    layer = new_layer(method, dtype=torch.bfloat16)
    floating = [t for t in layer.adapters.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    y = run(layer, torch.randn(4, IN, dtype=torch.bfloat16), method)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.adapters.parameters() if p.requires_grad)


@every_method
def test_compiles_whole(method):
    torch._dynamo.reset()
    layer = shake(new_layer(method, dtype=torch.float32))
    x = torch.randn(4, IN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    parameters = [p for p in layer.parameters() if p.requires_grad]
    want = run(layer, x, method)
    dy = torch.randn_like(want)
    wanted = torch.autograd.grad(want, parameters, dy)
    y = run_compiled(compiled, layer, x, method)
    torch.testing.assert_close(y, want)
    for one, other in zip(torch.autograd.grad(y, parameters, dy), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def run_compiled(compiled, layer, x, method):
    with side_inputs(layer, **case(method).side(x)):
        return compiled(x)


@every_method
def test_activation_checkpointing_gives_the_same_gradients(method):
    layer = shake(new_layer(method))
    x = torch.randn(4, IN, dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    y = run(layer, x, method)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, parameters, dy)
    with side_inputs(layer, **case(method).side(x)) as call:
        y = checkpoint(call.bind(layer), x, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(y, parameters, dy), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@every_method
def test_saved_and_loaded_by_an_unadapted_model(method, tmp_path):
    model = shake(new_model(method))
    x = torch.randn(4, IN, dtype=torch.float64)
    want = run(model, x, method)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    other = load_adapter(Siblings(), tmp_path)
    torch.testing.assert_close(run(other, x, method), want)
    written = read_weights(tmp_path)
    assert len(written) == len({id(p) for p in own_tensors(model)}), f"{WEIGHTS} holds a tensor twice"


def own_tensors(model):
    state = model.state_dict(keep_vars=True)
    return [value for key, value in state.items() if key in lora_state_dict(model)]


@every_method
def test_in_a_model_with_groups_and_without(method):
    together, apart = new_model(method), new_model(method, fuse=False)
    assert layer_groups(together) and not layer_groups(apart)
    shake(together)
    apart.load_state_dict(together.state_dict())
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(run(together, x, method), run(apart, x, method))
    if METHODS[method].mergeable:
        want = run(apart, x, method)
        merge_adapters(apart)
        torch.testing.assert_close(apart(x), want)
        unmerge_adapters(apart)


@every_method
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_active_adapter_lowers_once_a_call(method, dropout, count, monkeypatch):
    """What a method computes from its parameters may be dear, and may be drawn at random."""
    layer = new_layer(method, dtype=torch.float32, lora_dropout=dropout)
    layer.add_adapter("other", LoRAConfig(lora_dropout=dropout))
    layer.set_adapter(["default", "other"][:count])
    x, calls = torch.randn(3, IN), []
    for adapter in layer.adapters.values():
        count_calls(adapter, calls, monkeypatch)
    runs = [lambda: run(layer, x, method), layer.merged_weight]
    for go in runs if METHODS[method].mergeable else runs[:1]:
        calls.clear()
        go()
        assert len(calls) == len(set(calls)) == count


def count_calls(adapter, calls, monkeypatch):
    real = adapter.lower
    monkeypatch.setitem(adapter.__dict__, "lower", lambda *a: (calls.append(id(adapter)), real(*a))[1])


def test_members_of_a_group_lower_once(monkeypatch):
    model, calls = new_model("lora"), []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            count_calls(module.adapters["default"], calls, monkeypatch)
    model(torch.randn(2, IN, dtype=torch.float64))
    assert len(calls) == len(set(calls)) == 3


@every_method
def test_the_class_says_what_its_update_is(method):
    layer = shake(new_layer(method))
    adapter, x = layer.adapters["default"], torch.randn(3, IN, dtype=torch.float64)
    scope = side_inputs(layer, **case(method).side(x))
    with scope as call:
        update = adapter.lower(x, call)
    assert adapter.plain == (type(update) is LowRank and update.plain and not adapter.reads_x)
    if not adapter.reads_x:
        with side_inputs(layer, **case(method).side(x)) as call, contextlib.suppress(AttributeError):
            adapter.lower(None, call)


@every_method
def test_the_register_says_where_and_which_paper(method):
    line = methods.structures()[method]
    assert (Path(__file__).parents[2] / line.file).exists()
    assert METHODS[method].__module__ == f"lora_kernels.{line.home}"
    assert line.arxiv in METHODS[method].__doc__
    with pytest.raises(ValueError, match=f"method_options: {method} takes"):
        LoRAConfig(method=method, method_options={"no such option": 1})


def test_keys_are_unique_and_entries_lie_by_kind():
    keys = [line.key for line in methods.REGISTER]
    assert len(keys) == len(set(keys))
    kinds = [line.kind for line in methods.REGISTER]
    assert kinds == sorted(kinds, key=methods.KINDS.index)
