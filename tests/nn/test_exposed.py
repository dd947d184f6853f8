"""Layers that are read and not called, subclasses, and those that can have no adapter: one table for each."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRAConfig, apply_lora, quantize_base
from lora_kernels.nn import (
    disable_adapters,
    lora_layers,
    merge_adapters,
    mixed_adapters,
    remove_lora,
    unmerge_adapters,
)
from lora_kernels.nn.weight_reads import weight_reads
from lora_kernels.serving.modules import pool_linears


class Child(nn.Module):
    """Mamba's way: the parent multiplies by the weight."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        return x @ self.proj.weight.T + self.proj.bias


class Positions(nn.Module):
    """DeBERTa's way: a table of an embedding, from a method."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Embedding(6, 6)

    def table(self):
        return self.proj.weight if self.proj.weight.shape[0] else None

    def forward(self, x):
        return x @ self.table()


def project(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Helper(nn.Module):
    """A function of the module's file takes the layer."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        return project(self.proj, x)


class Loop(nn.Module):
    """Over a list, once under another name and once by its index."""

    def __init__(self):
        super().__init__()
        self.proj = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        for i, layer in enumerate(self.proj):
            x = F.linear(x, layer.weight, self.proj[i].bias).tanh()
        return x


class Deep(nn.Module):
    """A layer of a child's, which calls it as well."""

    def __init__(self):
        super().__init__()
        self.child = nn.Sequential(nn.Linear(6, 6))

    def forward(self, x):
        return self.child(x) + F.linear(x, self.child[0].weight)


class Kernel(nn.Module):
    """Convolutions by another function."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv1d(6, 6, 1)

    def forward(self, x):
        return F.conv1d(x[..., None], self.proj.weight, self.proj.bias)[..., 0]


class Inside(nn.Module):
    """Checkpoints a part of the forward that reads."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        return checkpoint(lambda y: F.linear(y, self.proj.weight).tanh(), x, use_reentrant=False)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x[None], x[None], x[None])[0][0]


class Scaled(nn.Linear):
    """A forward of its own, on its own weight."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Doubling(nn.Linear):
    """One that calls its base's."""

    def forward(self, x):
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    """Falcon's: a linear in other words."""

    def forward(self, input):
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Offset(nn.Embedding):
    """OPT's positions, and Gemma's scale."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, tokens):
        return self.norm(self.scale * super().forward(tokens + 1))


class Renamed(nn.Linear):
    """Nothing but another name."""


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = Offset(7, 6)

    def forward(self, x):
        return x @ self.proj(torch.arange(6))


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.proj = layer

    def forward(self, x):
        return self.proj(x)


READ = [Child, Positions, Helper, Loop, Deep, Kernel, Inside, Attention]
SUBCLASSES = {
    kind.__name__: (lambda kind=kind: Holder(kind(6, 6))) for kind in (Scaled, Doubling, Spelled, Renamed)
}
MODELS = {**{kind.__name__: kind for kind in READ}, **SUBCLASSES, "Offset": Embeds}
EVERYTHING = {"target_modules": r".*(proj|child\.0|proj\.\d)$"}
cases = pytest.mark.parametrize("name", MODELS)


def made(name, **options):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    apply_lora(model, LoRAConfig(**{"r": 2, "lora_alpha": 3, **EVERYTHING, **options}))
    shake(model)
    return model


def shake(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for parameter in layer.adapters.parameters():
            parameter.data += torch.randn(parameter.shape, generator=draw).to(parameter)


X = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6).sin()


@cases
@pytest.mark.parametrize("method", ["lora", "dora", "sora"])
def test_merged_and_unmerged_are_the_same_and_something_else_than_the_base(name, method):
    model = made(name, method=method)
    base = copy.deepcopy(model)
    remove_lora(base)
    want = model(X)
    assert not torch.allclose(want, base(X), atol=1e-3)
    with disable_adapters(model):
        torch.testing.assert_close(model(X), base(X), rtol=1e-12, atol=1e-12)
    merge_adapters(model)
    torch.testing.assert_close(model(X), want, rtol=1e-10, atol=1e-10)
    with disable_adapters(model):
        torch.testing.assert_close(model(X), base(X), rtol=1e-12, atol=1e-12)
    unmerge_adapters(model)
    torch.testing.assert_close(model(X), want, rtol=1e-12, atol=1e-12)
    remove_lora(model, merge=True)
    torch.testing.assert_close(model(X), want, rtol=1e-10, atol=1e-10)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


@cases
def test_gradients_are_those_of_finite_differences(name):
    model = made(name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters and all("adapters" in n for n, p in model.named_parameters() if p.requires_grad)

    def run(*_):
        return model(X)

    torch.autograd.gradcheck(run, parameters, fast_mode=True)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


@cases
def test_outside_of_a_forward_the_weight_is_the_base_parameter(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    before = {n: p for n, p in model.named_parameters()}
    apply_lora(model, LoRAConfig(r=2, **EVERYTHING))
    model(X)
    with pytest.raises((RuntimeError, ValueError, IndexError, AssertionError)):
        model(X[:, :3])
    for place, layer in lora_layers(model).items():
        assert layer.weight is before[f"{place}.weight"] and isinstance(layer.weight, nn.Parameter)


@cases
def test_copies_pickles_state_dicts_and_compiled_models(name):
    model = made(name)
    want = model(X)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(X), want)
        assert [type(m) for m in clone.modules()] == [type(m) for m in model.modules()]
    other = made(name)
    shake(other, seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), want)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name != "Inside")
    torch.testing.assert_close(compiled(X), want)
    (a, b) = (
        torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])
        for y in (want, compiled(X))
    )
    for one, two in zip(a, b, strict=True):
        torch.testing.assert_close(one, two)


def test_a_subclass_that_is_a_linear_in_other_words_is_one_fused_call():
    for name, plain in (("Spelled", True), ("Renamed", True), ("Doubling", False), ("Scaled", False)):
        assert made(name).proj.plain_forward is plain
        assert isinstance(made(name).proj, (Scaled, Doubling, Spelled, Renamed))


def test_two_adapters_and_a_switch():
    model = made("Child")
    first = model(X)
    apply_lora(model, LoRAConfig(r=3, **EVERYTHING), "other")
    model.proj.set_adapter("other")
    shake(model, seed=7)
    second = model(X)
    model.proj.set_adapter(["default", "other"])
    both = model(X)
    merge_adapters(model)
    torch.testing.assert_close(model(X), both)
    assert not torch.allclose(first, second) and not torch.allclose(second, both)


def test_autocast_leaves_the_weight_exact():
    model = made("Child").float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.proj.adapted_weight()
    assert inside.dtype == torch.float32 and torch.equal(inside, model.proj.adapted_weight())


@pytest.mark.parametrize("name", ["Child", "Positions", "Helper", "Attention"])
def test_dropout_that_cannot_act_is_named(name):
    with pytest.warns(UserWarning, match=r"lora_dropout: does nothing in .*proj.* reads its weight"):
        made(name, lora_dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made("Deep", lora_dropout=0.5)


def test_a_forward_that_only_asks_for_the_dtype_does_not_read():
    class Asks(Holder):
        def forward(self, x):
            if isinstance(self.proj.weight, torch.Tensor) and x.dtype != self.proj.weight.dtype:
                x = x.to(self.proj.weight.dtype)
            return self.proj(x)

    model = Asks(nn.Linear(6, 6))
    assert not weight_reads(model)
    apply_lora(model, LoRAConfig(r=2, target_modules=["proj"]))
    assert type(model.proj).__mro__[0].__name__ == "LoRALinear" and not model._forward_pre_hooks


def test_mixed_batches_pools_and_quantisation_refuse_a_layer_that_is_read():
    model = made("Child")
    with (
        mixed_adapters(model, ["default"] * 5),
        pytest.raises(RuntimeError, match="proj: its weight is read"),
    ):
        model(X)
    for verb in (lambda m: pool_linears(m, ["proj"]), lambda m: quantize_base(m, "int8", ["proj"])):
        with pytest.raises(
            ValueError, match="'proj' is not called: Child reads its weight without calling it"
        ):
            verb(Child())
    both = nn.Sequential(Child(), nn.Linear(6, 6))
    with pytest.warns(UserWarning, match=r"left as they are, 0\.proj"):
        quantize_base(both, "int8")
    both(torch.randn(2, 6))


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def replaced(layer):
    layer.forward = lambda x: x
    return layer


class Merging(nn.Linear):
    """A LoRA of the user's own."""

    def merge(self):
        """Something else."""


class Conv1D(nn.Module):
    """Of another module than GPT-2's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 6))


REFUSED = {
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(6, 6)), "made anew at every call"),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), "made anew at every call"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(6, 6)), "made anew at every call"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), "made anew at every call"),
    "pruned": (lambda: pruned(nn.Linear(6, 6)), "made anew at every call"),
    "replaced": (lambda: replaced(nn.Linear(6, 6)), "its forward was replaced"),
    "lazy": (lambda: nn.LazyLinear(6), "not there before the first call"),
    "merging": (lambda: Merging(6, 6), "it has merge of its own"),
    "normed_conv": (lambda: parametrizations.weight_norm(nn.Conv1d(6, 6, 1)), "made anew at every call"),
    "normed_embedding": (lambda: parametrizations.weight_norm(nn.Embedding(6, 6)), "made anew at every call"),
}


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:Lazy modules", "ignore:.*weight_norm. is deprecated"
)
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_have_no_adapter_is_refused_by_name(name):
    make, words = REFUSED[name]
    model = nn.ModuleDict({"proj": make(), "other": nn.Linear(6, 6)})
    before = {key: id(value) for key, value in model.named_modules()}
    with pytest.raises(ValueError, match=f"target_modules: 'proj' cannot be adapted: .*{words}"):
        apply_lora(model, LoRAConfig(r=2, target_modules=["proj", "other"]))
    assert {key: id(value) for key, value in model.named_modules()} == before
    if name.startswith("normed"):
        return
    with pytest.warns(UserWarning, match=f"left as they are, proj .*{words}"):
        apply_lora(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert list(lora_layers(model)) == ["other"]


def test_a_conv1d_of_another_module_is_called_by_its_whole_name():
    with pytest.raises(ValueError, match=rf"'proj' is of type {__name__}\.Conv1D, not a plain nn\.Linear"):
        pytest.importorskip("transformers.pytorch_utils")
        apply_lora(Holder(Conv1D()), LoRAConfig(r=2, target_modules=["proj"]))


@pytest.mark.parametrize("target", ["all-linear", r".*"])
def test_a_module_that_happens_to_be_called_adapters(target):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapters, self.out = nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 8)

    model = apply_lora(Model(), LoRAConfig(r=2, target_modules=target, bias="all"))
    assert list(lora_layers(model)) == ["adapters.0", "out"]
    assert model.adapters[0].bias.requires_grad and model.out.bias.requires_grad
    apply_lora(model, LoRAConfig(r=3, target_modules=target), "second")
    assert set(lora_layers(model)) == {"adapters.0", "out"}


class Speaker(nn.Module):
    """A language model whose head is called, until a trainer gives it another forward."""

    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        return self.lm_head(self.body(x))


def test_a_forward_that_is_put_in_place_later_reads_the_adapted_head():
    torch.manual_seed(0)
    model = Speaker()
    apply_lora(model, LoRAConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    x = torch.randn(4, 6)
    want = model(x)
    assert model.lm_head.weight is model.lm_head._own_weight
    model.forward = lambda x: F.linear(model.body(x), model.lm_head.weight)
    got = model(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    assert model.lm_head.adapters["default"].lora_A.grad.abs().max() > 0
