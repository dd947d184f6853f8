"""Gated MLPs: found by their source, one call where all three layers are plain, the class's forward else."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from graphs import Graphs

import lora_kernels.nn.mlp as mlp
from lora_kernels import LoRAConfig
from lora_kernels.nn import (
    apply_lora,
    disable_adapters,
    fused_mlps,
    merge_adapters,
    mixed_adapters,
    remove_lora,
    set_adapter,
    unfuse_mlps,
    unmerge_adapters,
)


class Gated(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        self.down_proj, self.act_fn = nn.Linear(12, 8), act or nn.SiLU()

    def forward(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class Direct(Gated):
    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Added(Gated):
    def forward(self, x):
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y + x


def adapted(kind=Gated, act=None, p=0.0, targets="all-linear", method="lora"):
    torch.manual_seed(0)
    config = LoRAConfig(r=2, lora_alpha=4, lora_dropout=p, target_modules=targets, method=method)
    model = apply_lora(nn.Sequential(kind(act)), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def calls(monkeypatch):
    """The activation of each fused call."""
    made, real = [], mlp.fused_mlp
    monkeypatch.setattr(mlp, "fused_mlp", lambda *args: (made.append(args[-1]), real(*args))[1])
    return made


def run(model, x):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = model(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(model, x):
    """Values, gradients and masks are those of the class's own forward."""
    plain = copy.deepcopy(model)
    unfuse_mlps(plain)
    assert not fused_mlps(plain)
    got, want = run(model, x), run(plain, x)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh")}


@pytest.mark.parametrize("p", (0.0, 0.4))
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kind", (Gated, Direct))
def test_one_call(kind, name, p, calls, x):
    model = adapted(kind, ACTIVATIONS[name](), p)
    assert fused_mlps(model) == ["0"]
    assert_same(model, x)
    assert calls == [name]


@pytest.mark.parametrize(
    "model",
    [
        lambda: adapted(Swapped),
        lambda: adapted(Added),
        lambda: adapted(act=nn.ReLU()),
        lambda: adapted(targets=["gate_proj", "up_proj"]),
    ],
    ids=("swapped", "added", "relu", "two layers"),
)
def test_what_is_another_function_is_left(model, calls, x):
    model = model()
    assert not fused_mlps(model)
    run(model, x)
    assert not calls


def test_layers_that_are_not_plain_take_the_classes_forward(calls, x):
    model = adapted()
    for layer in ("gate_proj", "up_proj", "down_proj"):
        one = model[0]._modules[layer]
        one.enable_adapters(False)
        assert_same(model, x)
        one.enable_adapters(True)
        handle = one.register_forward_hook(lambda module, args, y: y * 2)
        assert_same(model, x)
        handle.remove()
    handle = model[0].act_fn.register_forward_hook(lambda module, args, y: y * 2)
    assert_same(model, x)
    handle.remove()
    with disable_adapters(model):
        assert_same(model, x)
    merge_adapters(model)
    assert_same(model, x)
    assert not calls
    unmerge_adapters(model)
    assert_same(model, x)
    assert calls == ["silu"]


@pytest.mark.parametrize("method", ("dora", "sora"))
def test_methods_with_more_than_a_plain_linear(method, calls, x):
    assert_same(adapted(method=method), x)
    assert not calls


def test_other_adapters_and_removal(calls, x):
    model = adapted()
    apply_lora(model, LoRAConfig(r=3, target_modules="all-linear"), "other")
    set_adapter(model, "other")
    assert_same(model, x)
    assert calls == ["silu"]
    set_adapter(model, ["default", "other"])
    assert_same(model, x)
    with mixed_adapters(model, ["default", "other"]):
        model(x)
    assert calls == ["silu"]
    remove_lora(model)
    assert not fused_mlps(model) and "forward" not in vars(model[0])
    model(x)


def test_bad_input_is_refused_by_the_layer(x):
    with pytest.raises(ValueError, match="in_features"):
        adapted()(x[..., :7])
    with pytest.raises(TypeError, match="x: expected"):
        adapted()(x.double())


def test_checkpoint(x):
    model, found = adapted(p=0.4), []
    for through in (lambda f, v: f(v), lambda f, v: checkpoint(f, v, use_reentrant=False)):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        through(model, leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("recompute", (False, True))
def test_compiled(recompute, x):
    model, graphs = adapted(p=0.4), Graphs()

    def program(x):
        return checkpoint(model, x, use_reentrant=False) if recompute else model(x)

    program.zero_grad, program.parameters = model.zero_grad, model.parameters
    want = run(program, x)
    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, backend=graphs)
    compiled.zero_grad, compiled.parameters = model.zero_grad, model.parameters
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for one, other in zip(run(compiled, x), want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # Gate and up together, and what is between them and down is the compiler's to fuse.
    assert [op for op in graphs.ops[0] if op != "dropout_seed"] == ["lora_linear_group", "lora_linear"]
    torch._dynamo.reset()


def test_compiled_where_one_layer_is_not_plain(x):
    model, graphs = adapted(), Graphs()
    model[0].down_proj.enable_adapters(False)
    torch._dynamo.reset()
    got = run(torch.compile(model, fullgraph=True, backend=graphs), x)
    for one, other in zip(got, run(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert graphs.ops[0] == ["lora_linear_group"]
    torch._dynamo.reset()


def test_copies_and_pickles_compute_with_their_own_weights(calls, x):
    model = adapted()
    want = model(x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_mlps(clone) == ["0"]
        assert torch.equal(clone(x), want)
        with torch.no_grad():
            clone[0].down_proj.weight.add_(1)
        assert not torch.equal(clone(x), want)
    assert torch.equal(model(x), want)
    assert len(calls) == 6


def test_autocast_and_inference(calls, x):
    model = adapted()
    want = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(model(x.clone()), want)
    assert len(calls) == 3
