"""What an adapter owns beside its factors: it acts, trains, moves and goes with its adapter alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, quantize_base
from lora_kernels.nn import (
    delete_adapter,
    disable_adapters,
    lora_layers,
    lora_state_dict,
    merge_adapters,
    mixed_adapters,
    remove_lora,
    set_adapter,
    unmerge_adapters,
)


class Net(nn.Module):
    """An embedding tied to a head, norms with running statistics, a recurrent layer, a plain parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q, self.mid = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.mid[1](self.mid[0](self.q(self.embed(tokens))).transpose(1, 2)).transpose(1, 2)
        return self.head(self.rnn(x)[0])


OWNERS = {
    "head": {"modules_to_save": ["head"]},
    "tied, both": {"modules_to_save": ["head", "embed"]},
    "container": {"modules_to_save": ["mid"]},
    "recurrent": {"modules_to_save": ["rnn"]},
    "all biases": {"bias": "all"},
    "biases of layers": {"bias": "lora_only"},
    "all": {"modules_to_save": ["head", "embed", "mid", "rnn"], "bias": "all"},
}


@pytest.fixture
def tokens():
    return torch.randint(0, 11, (3, 4))


def net():
    torch.manual_seed(0)
    # Frozen: torch computes a GRU whose weights want no gradient by another kernel.
    return Net().eval().requires_grad_(False)


def config(**options):
    return LoRAConfig(r=2, target_modules=["q"], **options)


def shake(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def two(options):
    """A model with adapters a and b, both shaken, and what it computes with each."""
    model = apply_lora(net(), config(**options), "a")
    shake(model, 1)
    apply_lora(model, config(**options), "b")
    set_adapter(model, "b")
    shake(model, 2)
    return model


@pytest.mark.parametrize("options", OWNERS.values(), ids=OWNERS)
def test_each_adapter_has_its_own(options, tokens):
    base = net()(tokens)
    alone = apply_lora(net(), config(**options), "a")
    shake(alone, 1)
    model = two(options)
    second = model(tokens)
    set_adapter(model, "a")
    torch.testing.assert_close(model(tokens), alone(tokens))
    assert trainable(model) == trainable(alone)
    for _ in range(2):
        with disable_adapters(model):
            assert torch.equal(model(tokens), base)
        torch.testing.assert_close(model(tokens), alone(tokens))
    set_adapter(model, "b")
    assert torch.equal(model(tokens), second) and not torch.allclose(second, alone(tokens))


@pytest.mark.parametrize("options", OWNERS.values(), ids=OWNERS)
def test_it_trains_and_the_base_does_not(options, tokens):
    model = two(options)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    model(tokens).square().mean().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n]
    assert all(p.grad is not None for _, p in trained)
    torch.optim.SGD([p for _, p in trained], 0.1).step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("options", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("merge", [False, True])
def test_removed(options, merge, tokens):
    model, plain = two(options), [(n, type(m)) for n, m in net().named_modules()]
    want = model(tokens) if merge else net()(tokens)
    remove_lora(model, merge=merge)
    torch.testing.assert_close(model(tokens), want)
    assert [(n, type(m)) for n, m in model.named_modules()] == plain and not trainable(model)


@pytest.mark.parametrize("options", OWNERS.values(), ids=OWNERS)
def test_deleted(options, tokens):
    model = two(options)
    second = model(tokens)
    delete_adapter(model, "a")
    assert torch.equal(model(tokens), second)
    delete_adapter(model, "b")
    assert torch.equal(model(tokens), net()(tokens))
    assert not any("lora_owned" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("options", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copied_and_cast(options, clone, tokens):
    model = two(options)
    second = model(tokens)
    other = clone(model)
    other.double()
    set_adapter(other, "a")
    set_adapter(model, "a")
    torch.testing.assert_close(other(tokens), model(tokens), check_dtype=False)
    assert {p.dtype for p in other.parameters()} == {torch.float64}
    set_adapter(model, "b")
    assert torch.equal(model(tokens), second)


@pytest.mark.parametrize("options", OWNERS.values(), ids=OWNERS)
def test_merging_keeps_it(options, tokens):
    model = two(options)
    want = model(tokens)
    merge_adapters(model)
    torch.testing.assert_close(model(tokens), want)
    with disable_adapters(model):
        torch.testing.assert_close(model(tokens), net()(tokens))
    unmerge_adapters(model)
    assert torch.equal(model(tokens), want)


@pytest.mark.parametrize("options", OWNERS.values(), ids=OWNERS)
def test_a_state_dict_restores_it(options, tokens):
    model, other = two(options), two(options)
    shake(model, 3)
    assert not torch.allclose(other(tokens), model(tokens))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(tokens), model(tokens))
    shake(model, 4)
    assert not other.load_state_dict(lora_state_dict(model, "b"), strict=False).unexpected_keys
    torch.testing.assert_close(other(tokens), model(tokens))
    assert set(lora_state_dict(model, "a")).isdisjoint(lora_state_dict(model, "b"))


def test_adding_switching_and_loading_change_nothing_outside(tokens):
    model = apply_lora(net(), config(), "a")
    model.requires_grad_(False)
    model.mid[1].weight.requires_grad_(True)
    model.mid.train()
    apply_lora(model, config(modules_to_save=["head"]), "b")
    assert trainable(model) == {"mid.1.weight"} and model.mid[1].training and not model.training
    set_adapter(model, "b")
    assert trainable(model) - {"mid.1.weight"} == {
        "q.adapters.b.lora_A",
        "q.adapters.b.lora_B",
        "head.weight",
    }
    set_adapter(model, "a")
    assert trainable(model) == {"mid.1.weight", "q.adapters.a.lora_A", "q.adapters.a.lora_B"}


def test_flags_survive_being_off(tokens):
    model = two({"modules_to_save": ["head"]})
    model.head.weight.requires_grad_(False)
    with disable_adapters(model):
        pass
    assert not model.head.weight.requires_grad


def test_hooks_and_names_stay():
    model, calls = net(), []
    model.head.register_forward_hook(lambda *args: calls.append(1))
    head, names = model.head, [name for name, _ in model.named_parameters()]
    apply_lora(model, config(modules_to_save=["head"]))
    model(torch.zeros(1, 2, dtype=torch.long))
    assert model.head is head and calls == [1]
    assert set(names) <= {name for name, _ in model.named_parameters(remove_duplicate=False)}


def test_one_saves_what_another_adapts(tokens):
    model = apply_lora(net(), config(modules_to_save=["head"]), "a")
    shake(model, 1)
    first = model(tokens)
    apply_lora(model, LoRAConfig(r=2, target_modules=["head"], init_lora_weights=False), "b")
    assert torch.equal(model(tokens), first)
    set_adapter(model, "b")
    adapted = apply_lora(net(), LoRAConfig(r=2, target_modules=["head"], init_lora_weights=False), "b")
    adapted.load_state_dict(lora_state_dict(model, "b"), strict=False)
    torch.testing.assert_close(model(tokens), adapted(tokens))
    set_adapter(model, "a")
    assert torch.equal(model(tokens), first)


def test_ties_hold_where_they_are_asked_for(tokens):
    model = apply_lora(net(), config(modules_to_save=["embed"], ensure_weight_tying=True))
    assert model.head.weight is model.embed.weight and model.embed.weight.requires_grad
    shake(model, 1)
    with disable_adapters(model):
        assert model.head.weight is model.embed.weight
        assert torch.equal(model(tokens), net()(tokens))
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        apply_lora(net(), LoRAConfig(r=2, target_modules=["embed"], ensure_weight_tying=True))
    loose = apply_lora(net(), config(modules_to_save=["embed"]))
    assert loose.head.weight is not loose.embed.weight and not loose.head.weight.requires_grad


def test_two_owners_of_one_module_are_refused(tokens):
    model = two({"modules_to_save": ["head"]})
    want = model(tokens)
    with pytest.raises(ValueError, match="a, b, which have each a version of 'head'"):
        set_adapter(model, ["a", "b"])
    assert torch.equal(model(tokens), want) and lora_layers(model)["q"].active == ("b",)
    with pytest.raises(ValueError, match="'b' owns parameters"), mixed_adapters(model, ["a", "b"]):
        pass


def test_names_that_end_so_are_saved_as_in_peft():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        net(), peft.LoraConfig(target_modules=["q"], modules_to_save=["ead", "id.0"])
    )
    saved = {
        n.split(".modules_to_save")[0]
        for n, p in theirs.base_model.model.named_parameters()
        if ".modules_to_save" in n
    }
    model = apply_lora(net(), config(modules_to_save=["ead", "id.0"]))
    assert {name.rpartition(".")[0] for name in trainable(model) if "adapters" not in name} == saved
    with pytest.warns(UserWarning, match="nope"):
        apply_lora(net(), config(modules_to_save=["head", "nope"]))


def test_an_owned_weight_is_not_quantised():
    model = apply_lora(net(), config(modules_to_save=["mid.0"]))
    with pytest.raises(ValueError, match=r"mid\.0: an adapter owns"):
        quantize_base(model, "int8")
    with pytest.raises(ValueError, match="adapter_name"):
        apply_lora(net(), config(), "__base__")


def test_what_fsdp2_holds_is_not_switched(tmp_path, tokens):
    """In one process: FSDP2 writes its own tensors into the places that a switch would change."""
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.fsdp import fully_shard

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = apply_lora(net(), config(modules_to_save=["mid.0"]))
        model = fully_shard(apply_lora(model, config(), "b"))
        want = model(tokens)
        with pytest.raises(RuntimeError, match="choose the adapter before"), disable_adapters(model):
            pass
        with pytest.raises(RuntimeError, match="choose the adapter before"):
            set_adapter(model, "b")
        torch.testing.assert_close(model(tokens), want)
        assert set(lora_layers(model)["q"].adapters) == {"default", "b"}
    finally:
        distributed.destroy_process_group()


def test_each_adapter_has_its_optimiser(tokens):
    options = {"modules_to_save": ["head"], "bias": "lora_only"}

    def step(model, optimiser):
        optimiser.zero_grad()
        model(tokens).square().mean().backward()
        optimiser.step()

    def optimiser_of(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    model = two(options)
    optimisers = {}
    for name in ("a", "b"):
        set_adapter(model, name)
        optimisers[name] = optimiser_of(model)
    alone = two(options)
    set_adapter(alone, "a")
    optimiser = optimiser_of(alone)
    for _ in range(3):
        for name in ("a", "b"):
            set_adapter(model, name)
            step(model, optimisers[name])
        step(alone, optimiser)
    set_adapter(model, "a")
    torch.testing.assert_close(model(tokens), alone(tokens))
