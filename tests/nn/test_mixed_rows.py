"""Mixed batches of every kind: each sample has its own adapter wherever a layer has the samples, or it is an
error; never because some size happens to fit."""

from functools import partial

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, accelerate
from lora_kernels.nn import apply_lora, mixed_adapters, set_adapter, train_adapters
from lora_kernels.nn.rows import Samples
from lora_kernels.optim import DerivativeFree
from lora_kernels.serving.modules import apply_multi_lora, use_adapters
from lora_kernels.serving.pool import AdapterPool

NAMES = ["a", "__base__", "b"]


class Text(nn.Module):
    """Takes [B, T] or [B, T, 8], and has them as ``kind`` says where its linear reads them."""

    main_input_name = "input_ids"  # with `config`, what Transformers' models have: samples first

    def __init__(self, kind, contract=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.kind = kind
        if contract:
            self.config = None

    def forward(self, input_ids=None, x=None):
        first = self.kind == "time embedded"  # XLNet does so
        h = self.embed(input_ids.T if first else input_ids) if x is None else x
        h = h.transpose(0, 1) if first else h
        if self.kind == "batch":
            return self.fc(h)
        if self.kind.startswith("time"):
            return self.fc(h.transpose(0, 1)).transpose(0, 1)
        if self.kind == "flat":
            return self.fc(h.flatten(0, 1)).view(h.shape)
        if self.kind == "positions":
            return h + self.fc(self.embed.weight[: h.shape[1]])
        if self.kind == "pooled":
            return self.fc(h.mean(1))
        assert self.kind == "routed"
        y = torch.zeros_like(h)
        rows = h.flatten(0, 1)
        chosen = torch.arange(len(rows)) % h.shape[1] == 0  # as many as there are samples, if T is fixed
        chosen[: h.shape[1]] = torch.arange(h.shape[1]) < 2
        chosen[-h.shape[1] :] = False
        y.view_as(rows)[chosen] = self.fc(rows[chosen])
        return y


def factors(name):
    draw = torch.Generator().manual_seed(ord(name))
    return torch.randn(4, 8, generator=draw), torch.randn(8, 4, generator=draw)


def pooled(model, sites, names, call, **said):
    pool = AdapterPool({site: (20, 8) if site == "embed" else (8, 8) for site in sites})
    for name in "ab":
        a, b = factors(name)
        wide = a.repeat(1, 3)[:, :20]
        pool.register(name, {site: (wide if site == "embed" else a, b) for site in sites})
    apply_multi_lora(model, pool)
    with torch.no_grad(), use_adapters(model, names, **said):
        return call(model)


def fitted(model, sites):
    for name in "ab":
        apply_lora(model, LoRAConfig(r=4, lora_alpha=4, target_modules=list(sites)), name)
        a, b = factors(name)
        for site in sites:
            adapter = model.get_submodule(site).adapters[name]
            adapter.lora_A.data, adapter.lora_B.data = a.clone(), b.clone()
    return model


def mixed(model, sites, names, call, **said):
    with mixed_adapters(fitted(model, sites), names, **said):
        return call(model)


def one_by_one(model, sites, names, call):
    """Each sample as its adapter makes it where the whole batch uses that."""
    pool = {}
    fitted(model, [s for s in sites if s != "embed"])
    weight = model.embed.weight.detach().clone()
    for name in set(names):
        set_adapter(model, [] if name == "__base__" else name)
        if "embed" in sites:
            a, b = factors(name) if name != "__base__" else (torch.zeros(4, 8), torch.zeros(8, 4))
            model.embed.weight.data = weight + (b @ a.repeat(1, 3)[:, :20]).T
        pool[name] = call(model)
    return torch.stack([pool[name][i] for i, name in enumerate(names)])


WAYS = {"pool": pooled, "mixed": mixed}


def tokens(length):
    return torch.arange(3 * length).view(3, length) % 20


@pytest.mark.parametrize("length", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["batch", "time", "pooled", "time embedded"])
@pytest.mark.parametrize("way", WAYS)
def test_wherever_the_samples_are_each_has_its_own(way, kind, length):
    """Also where there are as many tokens as samples, and in the first call."""
    sites = ["fc", "embed"] if way == "pool" and "embedded" in kind else ["fc"]
    y = WAYS[way](Text(kind), sites, NAMES, lambda model: model(input_ids=tokens(length)))
    want = one_by_one(Text(kind), sites, NAMES, lambda model: model(input_ids=tokens(length)))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["positions", "routed", "flat"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_no_samples_are_an_error(way, kind, length):
    """Or right: of one token a sample there is one row."""
    model = Text(kind)
    if kind == "flat" and length == 1:
        y = WAYS[way](model, ["fc"], NAMES, lambda model: model(input_ids=tokens(1)))
        torch.testing.assert_close(y, one_by_one(Text(kind), ["fc"], NAMES, lambda m: m(input_ids=tokens(1))))
        return
    with pytest.raises(ValueError, match="at 'fc'"):
        WAYS[way](model, ["fc"], NAMES, lambda model: model(input_ids=tokens(length)))


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_leave_it_open_need_a_word(way):
    """A module of torch may be given [T, B, H]."""
    x = torch.randn(3, 3, 8)

    def call(model):
        return model(x=x)

    with pytest.raises(ValueError, match=r"dimension 0 or 1, and nothing tells.*batch_dim="):
        WAYS[way](Text("batch", contract=False), ["fc"], NAMES, call)
    for dim in (0, 1):
        y = WAYS[way](Text("batch", contract=False), ["fc"], NAMES, call, batch_dim=dim)
        turned = x.transpose(0, dim)
        want = one_by_one(Text("batch"), ["fc"], NAMES, partial(Text.forward, x=turned)).transpose(0, dim)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="batch_dim="):
        WAYS[way](
            Text("batch", contract=False), ["fc"], NAMES, lambda m: m(x=torch.randn(4, 2, 8)), batch_dim=0
        )


@pytest.mark.parametrize("way", WAYS)
def test_of_one_adapter_a_square_is_no_question(way):
    x = torch.randn(2, 2, 8)
    y = WAYS[way](Text("batch", contract=False), ["fc"], ["a", "a"], lambda m: m(x=x))
    want = one_by_one(Text("batch", contract=False), ["fc"], ["a", "a"], lambda m: m(x=x))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


def test_the_trial_leaves_no_trace_and_is_the_only_one():
    model, calls = Text("batch"), []
    model.register_buffer("seen", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, args: calls.append(torch.rand(()) + module.seen.add_(1)))
    fitted(model, ["fc"])
    torch.manual_seed(3)
    with mixed_adapters(model, NAMES):
        model(input_ids=tokens(3))
        model(input_ids=tokens(3))
    after = torch.rand(())
    torch.manual_seed(3)
    torch.rand(()), torch.rand(())
    assert model.training and len(calls) == 3 and model.seen == 2 and after == torch.rand(())


def test_a_trial_that_fails_refuses_what_it_leaves_open_alone():
    class Strict(Text):
        def forward(self, input_ids):
            assert len(input_ids) == 3
            return super().forward(input_ids)

    with mixed_adapters(fitted(Strict("batch"), ["fc"]), NAMES):
        pass
    mixed(Strict("batch"), ["fc"], NAMES, lambda model: model(tokens(4)))
    with pytest.raises(ValueError, match="nothing tells which"):
        mixed(Strict("batch"), ["fc"], NAMES, lambda model: model(tokens(3)))


@pytest.mark.parametrize("length", [4, 6, 8])
@pytest.mark.parametrize("place", ["batch", "time", "positions"])
@pytest.mark.parametrize("made", ["ours", "accelerated"])
def test_each_candidate_of_a_population_has_its_rows(made, place, length):
    """Also where T is a multiple of the candidates, or of candidates times samples."""
    pytest.importorskip("cma")
    text = model = Text(place)
    if made == "ours":
        apply_lora(model, LoRAConfig(r=2, target_modules=["fc"]))
    else:
        peft = pytest.importorskip("peft")
        model = peft.PeftModel(model, peft.LoraConfig(r=2, target_modules=["fc"]))
        accelerate(model)
    optimizer = DerivativeFree(model, dim=4, popsize=3)

    def losses(x):
        return text(x=x).square().mean((1, 2))

    x = torch.randn(2, length, 8)
    if place == "positions":
        with pytest.raises(ValueError, match=r"at '.*fc'"):
            optimizer.step(losses, x)
        return
    assert optimizer.step(losses, x) == pytest.approx(losses(x).mean().item())


def test_what_is_said_is_checked():
    model = Text("batch")
    train_adapters(model, {"a": LoRAConfig(target_modules=["fc"])})
    for said, error in (
        ({"batch_dim": "0"}, TypeError),
        ({"batch_dim": -1}, ValueError),
        ({"repeats": [0]}, ValueError),
        ({"repeats": [1.5]}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(said))), mixed_adapters(model, ["a"], **said):
            pass
    assert Samples.said(["a", "a"]).alike
