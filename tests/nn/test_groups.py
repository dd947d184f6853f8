"""Layers that share an input: found in the source, computed together, and alone where that is not right."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from graphs import Graphs

import lora_kernels.nn.groups as groups
from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import (
    apply_lora,
    disable_adapters,
    group_layers,
    layer_groups,
    merge_adapters,
    remove_lora,
    set_adapter,
)
from lora_kernels.nn.groups import shared_inputs, ungroup_layers, why_alone, why_alone_compiled


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.v_proj, self.o_proj = nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x, fail=False):
        q, k = torch.tanh(self.q_proj(x)), self.k_proj(x)
        if fail:
            raise KeyError("in the middle")
        return self.o_proj(q + torch.cat([k, self.v_proj(x)], -1))


class Cross(Attention):
    def forward(self, x, other):
        return self.o_proj(self.q_proj(x) + torch.cat([self.k_proj(other), self.v_proj(other)], -1))


class Rebound(Attention):
    def forward(self, x):
        q = self.q_proj(x)
        x = x * 2
        k = self.k_proj(x)
        return self.o_proj(q + torch.cat([k, self.v_proj(x)], -1))


class InPlace(Attention):
    def forward(self, x):
        q = self.q_proj(x)
        x.mul_(2)
        return self.o_proj(q + torch.cat([self.k_proj(x), self.v_proj(x)], -1))


class Skipping(Attention):
    def forward(self, x, skip=True):
        q = self.q_proj(x)
        return q if skip else q + torch.cat([self.k_proj(x), self.v_proj(x)], -1)


class Twice(Attention):
    def forward(self, x):
        return self.q_proj(x) + self.q_proj(x) + torch.cat([self.k_proj(x), self.v_proj(x)], -1)


QKV = ("q_proj", "k_proj", "v_proj")


def adapted(kind=Attention, p=0.0, **options):
    torch.manual_seed(0)
    config = LoRAConfig(r=2, lora_alpha=4, lora_dropout=p, target_modules="all-linear", **options)
    model = apply_lora(kind(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def run(model, *args, **kwargs):
    model.zero_grad()
    args = tuple(a.clone().requires_grad_() for a in args)
    inputs = tuple(a.clone() for a in args)  # so that a model may write into them
    torch.manual_seed(7)
    y = model(*inputs, **kwargs)
    y.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), *(a.grad for a in args), *grads]


def assert_same(model, *args, **kwargs):
    """Values, gradients and masks of the model are those it has without groups."""
    plain = copy.deepcopy(model)
    ungroup_layers(plain)
    assert not layer_groups(plain)
    got, want = run(model, *args, **kwargs), run(plain, *args, **kwargs)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """The number of members of each call of the group op."""
    made, real = [], groups.fused_group
    monkeypatch.setattr(groups, "fused_group", lambda members: (made.append(len(members)), real(members))[1])
    return made


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("p", (0.0, 0.4))
def test_query_key_and_value_are_one_call(p, calls, x):
    model = adapted(p=p)
    assert layer_groups(model) == [QKV]
    assert_same(model, x)
    assert calls == [3]


@pytest.mark.parametrize("kind", (Rebound, Skipping, Twice))
def test_what_is_not_one_input_is_still_right(kind, x):
    model = adapted(kind, 0.0 if kind is not Rebound else 0.3)
    assert_same(model, x)


@torch.no_grad()
def test_a_write_into_the_input_is_seen(x):
    model = adapted(InPlace)
    plain = copy.deepcopy(model)
    ungroup_layers(plain)
    torch.testing.assert_close(model(x.clone()), plain(x.clone()))


def test_another_variable_is_another_group(calls, x):
    model = adapted(Cross, 0.3)
    assert layer_groups(model) == [("k_proj", "v_proj")]
    assert_same(model, x, x.flip(0))
    assert calls == [2]
    assert shared_inputs(Rebound(), QKV) == [("k_proj", "v_proj")]


def test_why_a_layer_is_alone():
    model = adapted(Cross)
    reasons = dict(why_alone(model, layer_groups(model)))
    assert set(reasons) == {"q_proj", "o_proj"}
    assert reasons["q_proj"] == "in the forward of Cross it shares its input with no other"
    unread = adapted(type("Unread", (Attention,), {"forward": eval("lambda self, x: self.q_proj(x)")}))
    assert not layer_groups(unread)
    assert "has no source to read" in dict(why_alone(unread, []))["q_proj"]


def test_a_layer_that_is_not_called_gets_no_gradient(calls, x):
    model = adapted(Skipping)
    run(model, x)
    assert calls == [3]
    assert model.q_proj.adapters["default"].lora_A.grad is not None
    assert model.k_proj.adapters["default"].lora_A.grad is None


def test_nothing_waits_after_the_forward(x):
    model = adapted(Skipping)
    for fail in (False, True):
        model = adapted(Attention) if fail else model
        given = x.clone()
        alive = weakref.ref(given)
        try:
            y = model(given, fail) if fail else model(given)
            del y
        except KeyError:
            assert fail
        assert not groups._local.scopes
        del given
        gc.collect()
        assert alive() is None


def test_after_an_exception_the_next_call_is_right(x):
    model = adapted(p=0.2)
    with pytest.raises(KeyError):
        model(x, fail=True)
    assert_same(model, x)


def test_a_layer_called_outside_of_its_parent_is_alone(calls, x):
    model = adapted()
    model.q_proj(x)
    assert not calls


def test_layers_that_are_not_plain_are_left_out(calls, x):
    model = adapted()
    model.k_proj.enable_adapters(False)
    assert_same(model, x)
    model.k_proj.enable_adapters(True)
    model.q_proj.merge()
    assert_same(model, x)
    assert calls == [2, 2]
    model.v_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_same(model, x)
    assert calls == [2, 2]
    model.v_proj._forward_pre_hooks.clear()
    with disable_adapters(model):
        assert_same(model, x)
    merge_adapters(model)
    assert_same(model, x)
    assert calls == [2, 2]


def test_other_adapters_and_removal(calls, x):
    model = adapted()
    apply_lora(model, LoRAConfig(r=3, target_modules=["q_proj", "v_proj"]), "other")
    assert layer_groups(model) == [QKV]
    set_adapter(model, "other")
    assert_same(model, x)
    assert calls == [2]
    set_adapter(model, ["default", "other"])
    assert_same(model, x)
    remove_lora(model)
    assert not layer_groups(model) and not model._forward_hooks and not model._forward_pre_hooks
    assert type(model) is Attention
    model(x)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(reentrant, x):
    model, found = adapted(p=0.4), []
    for through in (lambda f, v: f(v), lambda f, v: checkpoint(f, v, use_reentrant=reentrant)):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        through(model, leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        assert not groups._local.scopes
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def compiled(run, graphs=None):
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, backend=graphs or Graphs())


def assert_compiles(model, x, groups_in_graph, again=lambda f: f):
    """Compiled, the model gives what it gives without groups; twice with one compilation."""
    graphs, plain = Graphs(), copy.deepcopy(model)
    ungroup_layers(plain)
    with torch._dynamo.config.patch(error_on_recompile=True):
        program = compiled(again(model), graphs)
        program.zero_grad = model.zero_grad
        program.parameters = model.parameters
        for _ in range(2):
            for one, other in zip(run(program, x), run(plain, x), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    assert graphs.count("lora_linear_group") == groups_in_graph


def recomputing(model):
    return lambda x: checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("again", (lambda f: f, recomputing))
def test_compiled(again, x):
    assert_compiles(adapted(p=0.4), x, 1, again)


@pytest.mark.parametrize("kind", (Rebound, Skipping, Twice, InPlace))
def test_compiled_what_is_not_one_input(kind, x):
    model = adapted(kind)
    alone = kind in (Skipping, InPlace)
    assert isinstance(model, groups._Grouped) is not alone
    if kind is InPlace:  # gradients of what is written into are not for a linear
        plain = copy.deepcopy(model)
        ungroup_layers(plain)
        with torch.no_grad():
            torch.testing.assert_close(compiled(model)(x.clone()), plain(x.clone()))
    else:
        assert_compiles(model, x, 0 if alone else 1)


class Given(Attention):
    def forward(self, x):
        q = self.q_proj(x)
        return self.o_proj(q + torch.cat([self.k_proj(x), self.v_proj(x)], -1) + torch.relu(x))


class Scaled(Attention):
    def forward(self, x):
        q, half = self.q_proj(x), x.clone()
        half *= 0.5
        return self.o_proj(q + half + torch.cat([self.k_proj(x), self.v_proj(x)], -1))


def test_compiled_without_a_twin(x):
    model = adapted(Scaled, 0.3)
    assert type(model) is Scaled and layer_groups(model) == [QKV]
    reason = "something is written in place between the calls"
    assert why_alone_compiled(model) == [(name, reason) for name in QKV]
    assert_compiles(model, x, 0)
    assert not why_alone_compiled(adapted(Given))
    assert_compiles(adapted(Given, 0.3), x, 1)  # after the last call anything goes


def test_compiled_layers_that_are_not_plain_are_left_out(x):
    model = adapted()
    model.k_proj.enable_adapters(False)
    assert_compiles(model, x, 1)
    model.q_proj.merge()
    assert_compiles(model, x, 0)
    model = adapted()
    model.v_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.q_proj.register_forward_hook(lambda module, args, y: y * 2)
    assert_compiles(model, x, 0)
    remove_lora(model)
    assert type(model) is Attention


def test_compiled_where_settings_change_between_the_calls(x):
    class Part(Attention):
        def forward(self, x):
            q = self.q_proj(x)
            with torch.no_grad():
                k = self.k_proj(x)
            return self.o_proj(q + torch.cat([k, self.v_proj(x)], -1))

    model = adapted(Part)
    assert type(model) is Part
    assert_compiles(model, x, 0)


def test_a_forward_that_was_replaced_is_the_one_that_runs(x, monkeypatch):
    class Late(Attention):
        def forward(self, x):
            return self.q_proj(x) + torch.cat([self.k_proj(x), self.v_proj(x)], -1)

    model = adapted(Late)
    monkeypatch.setattr(Late, "forward", lambda self, x: self.q_proj(x) * 3)
    with torch.no_grad():
        want = model.q_proj(x) * 3
        for program in (model, compiled(model)):
            torch.testing.assert_close(program(x), want)


def test_the_class_is_the_parents_own_to_those_who_look(x):
    model = adapted()
    kind = type(model)
    assert kind is not Attention and isinstance(model, Attention)
    assert (kind.__name__, kind.__qualname__, kind.__module__, kind.__doc__) == (
        *("Attention", "Attention", Attention.__module__),
        Attention.__doc__,
    )
    assert type(adapted()) is kind  # one for all layers of a model, which compile once
    assert inspect.signature(model.forward) == inspect.signature(Attention().forward)
    plain = copy.deepcopy(model)
    ungroup_layers(plain)
    assert type(plain) is Attention and type(model) is kind
    assert repr(plain) == repr(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    model.load_state_dict(plain.state_dict())
    group_layers(plain)
    assert type(plain) is kind


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_of_the_parents_class(protocol, x, monkeypatch):
    model = adapted()
    saved = io.BytesIO()
    torch.save(model, saved, pickle_protocol=max(protocol, 2))
    text = pickle.dumps(model, protocol)
    for clone in (pickle.loads(text), torch.load(io.BytesIO(saved.getvalue()), weights_only=False)):
        assert type(clone) is type(model)
        assert torch.equal(clone(x), model(x))
    # Where the source is not at hand, or another one, the model is still read.
    monkeypatch.setattr(groups, "_grouped_class", lambda *args: "no source")
    clone = pickle.loads(text)
    assert type(clone) is Attention
    assert torch.equal(clone(x), model(x))


def test_layers_of_one_class_are_compiled_once_and_classes_apart(x):
    graphs, layers = Graphs(), [adapted(), adapted(), adapted(Cross), adapted(Cross)]
    assert len({id(type(layer).forward.__code__) for layer in layers}) == 2
    torch._dynamo.reset()
    for layer in layers:
        layer.compile(fullgraph=True, backend=graphs)
        layer(*([x] if type(layer).__name__ == "Attention" else [x, x + 1]))
    torch._dynamo.reset()
    assert [ops.count("lora_linear_group") for ops in graphs.ops] == [1, 1]


def test_a_compiled_copy_has_its_own_parameters(x):
    model = adapted()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            clone.k_proj.weight.add_(1)
            torch.testing.assert_close(compiled(clone)(x), clone(x))
            assert not torch.equal(clone(x), model(x))


def test_copies_and_pickles_keep_their_own_groups(calls, x):
    model = adapted()
    want = model(x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert layer_groups(clone) == [QKV]
        assert torch.equal(clone(x), want)
        with torch.no_grad():
            clone.k_proj.weight.add_(1)
        assert not torch.equal(clone(x), want)
    assert torch.equal(model(x), want)


def test_inference_autocast_and_threads(calls, x):
    model = adapted()
    want = model(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(x.clone()), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert calls == [3, 3, 3]
    results, inputs = [None] * 4, [x + i for i in range(4)]

    def work(i):
        for _ in range(20):
            results[i] = model(inputs[i]).detach()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for given, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, model(given))
