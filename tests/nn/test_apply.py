from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import (
    LoRALinear,
    apply_lora,
    count_parameters,
    disable_adapters,
    lora_configs,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_adapters,
    print_trainable_parameters,
    remove_lora,
    set_adapter,
    unmerge_adapters,
)


@pytest.mark.parametrize("options", [{"exclude_modules": ["2"]}, {"modules_to_save": ["2"]}], ids=str)
def test_targets_that_are_left_out_on_purpose_are_no_strays(options):
    """PEFT's files of "all-linear" list them."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(model, LoRAConfig(r=1, target_modules=["0", "1", "2"], **options))
    assert list(lora_layers(model)) == ["0", "1"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.out(torch.tanh(self.q(x)) * self.k(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.seq = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.seq(x))


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def tokens():
    return torch.randint(0, 11, (2, 5))


def shake(model):
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.normal_(std=0.3)


def snapshot(model):
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    return kinds, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


QS = {f"layers.{i}.q" for i in range(3)}
TARGETS = [
    ({"target_modules": ["q"]}, QS),  # not "seq", which only ends in the letter
    ({"target_modules": ("layers.1.q", "k")}, {"layers.1.q", *(f"layers.{i}.k" for i in range(3))}),
    ({"target_modules": {"q"}, "exclude_modules": ["layers.2.q"]}, QS - {"layers.2.q"}),
    (
        {"target_modules": ["q", "k"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {f"layers.{i}.{n}" for i in (0, 2) for n in "qk"},
    ),
    (
        {"target_modules": ["q", "seq"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
        {"layers.1.q", "seq"},  # named whole
    ),
    ({"target_modules": r"layers\.[01]\.(q|out)"}, {f"layers.{i}.{n}" for i in (0, 1) for n in ("q", "out")}),
    ({"target_modules": r".*q", "exclude_modules": r".*\.1\..*"}, {"layers.0.q", "layers.2.q", "seq"}),
    (
        {"target_modules": r".*(layers\.0.*|q)", "modules_to_save": ["seq"]},
        QS | {"layers.0.k", "layers.0.out"},
    ),
]


@pytest.mark.parametrize("fields,want", TARGETS)
def test_targets(model, fields, want):
    apply_lora(model, LoRAConfig(r=2, **fields))
    assert set(lora_layers(model)) == want


@pytest.mark.parametrize("fields,want", TARGETS[:5])
def test_targets_are_those_of_peft(model, fields, want):
    peft = pytest.importorskip("peft")
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **fields)).base_model.model
    theirs = {n for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert theirs == want


@pytest.mark.parametrize("numbers", [1, [0, 2], []], ids=str)
def test_numbers_of_blocks_are_peft_s_without_their_names(numbers):
    peft = pytest.importorskip("peft")
    fields = {"r": 2, "target_modules": ["q", "seq"], "layers_to_transform": numbers}
    wrapped = peft.get_peft_model(nn.ModuleDict({"model": Model()}), peft.LoraConfig(**fields))
    theirs = {
        n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert set(lora_layers(apply_lora(nn.ModuleDict({"model": Model()}), LoRAConfig(**fields)))) == theirs


def test_all_linear_spares_the_output_embedding(model):
    apply_lora(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert "head" in lora_layers(model)
    other = Model()
    other.get_output_embeddings = lambda: other.head
    apply_lora(other, LoRAConfig(r=2, target_modules="all-linear"))
    assert set(lora_layers(other)) == set(lora_layers(model)) - {"head"}


def test_a_fresh_adapter_changes_no_output(model, tokens):
    before = model(tokens)
    assert apply_lora(model, LoRAConfig(r=2, target_modules="all-linear")) is model
    assert torch.equal(model(tokens), before)
    shake(model)
    assert not torch.allclose(model(tokens), before)


def test_patterns_set_rank_and_alpha(model):
    config = LoRAConfig(
        r=2, lora_alpha=4, target_modules=["q", "k"], rank_pattern={"layers.1.q": 3}, alpha_pattern={"k": 5}
    )
    apply_lora(model, config)
    got = {
        n: (layer.adapters["default"].r, layer.adapters["default"].scaling)
        for n, layer in lora_layers(model).items()
    }
    assert got["layers.0.q"] == (2, 2.0) and got["layers.1.q"] == (3, 4 / 3) and got["layers.1.k"] == (2, 2.5)


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"target_modules": ["nope"]}, r"target_modules: \['nope'\] matches no nn.Linear.*layers.0.q"),
        ({"target_modules": "nope.*"}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["q", "norm"]}, "target_modules: 'layers.0.norm' is of type LayerNorm"),
        ({"target_modules": ["q"], "modules_to_save": ["nope"]}, "modules_to_save"),
        ({"target_modules": ["q", "head"], "r": 9, "method": "lora_xs"}, "r: lora_xs"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(model, fields, words):
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        apply_lora(model, LoRAConfig(**{"r": 2, **fields}))
    assert snapshot(model) == before and not lora_configs(model)


def test_wrong_types_are_named(model):
    with pytest.raises(TypeError, match="config"):
        apply_lora(model, {"r": 8})
    with pytest.raises(TypeError, match="model"):
        apply_lora("model", LoRAConfig(target_modules=["q"]))


def test_a_name_that_matches_nothing_among_others_warns(model):
    with pytest.warns(UserWarning, match="no linear is named nope"):
        apply_lora(model, LoRAConfig(r=2, target_modules=["q", "nope"]))
    assert set(lora_layers(model)) == QS


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_trains(model, bias):
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    apply_lora(model, LoRAConfig(r=2, target_modules=["q"], modules_to_save=["head"], bias=bias))
    got = {name for name, p in model.named_parameters() if p.requires_grad}
    want = {f"layers.{i}.q.adapters.default.lora_{f}" for i in range(3) for f in "AB"} | {
        "head.weight",
        "head.bias",
    }
    if bias == "lora_only":
        want |= {f"layers.{i}.q.bias" for i in range(3)}
    if bias == "all":
        want |= biases
    assert got == want
    assert set(lora_state_dict(model)) == want


def test_mark_refuses_another_bias(model):
    with pytest.raises(ValueError, match="bias"):
        mark_only_lora_as_trainable(model, "some")


def test_lora_state_dict_restores_another_model(model, tokens):
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    config = LoRAConfig(r=2, target_modules=["q", "out"], modules_to_save=["head"], bias="lora_only")
    apply_lora(model, config)
    apply_lora(other, config)
    shake(model)
    with torch.no_grad():
        model.head.weight.normal_()
        model.layers[0].q.bias.normal_()
    assert not torch.allclose(other(tokens), model(tokens))
    unexpected = other.load_state_dict(lora_state_dict(model, "default"), strict=False).unexpected_keys
    assert not unexpected
    assert torch.equal(other(tokens), model(tokens))


def test_lora_state_dict_knows_its_adapters(model):
    with pytest.raises(ValueError, match="expected one of none"):
        lora_state_dict(model, "default")


def test_a_second_adapter_waits_until_it_is_chosen(model, tokens):
    apply_lora(model, LoRAConfig(r=2, target_modules=["q"]))
    shake(model)
    first = model(tokens)
    apply_lora(model, LoRAConfig(r=3, target_modules=["q", "k"], init_lora_weights=False), "other")
    assert torch.equal(model(tokens), first)
    assert set(lora_layers(model)) == QS | {f"layers.{i}.k" for i in range(3)}
    assert set(lora_state_dict(model, "other")).isdisjoint(lora_state_dict(model, "default"))
    set_adapter(model, "other")
    second = model(tokens)
    assert not torch.allclose(second, first)
    assert {
        n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad
    } == {"other"}
    set_adapter(model, ["default", "other"])
    assert lora_layers(model)["layers.0.q"].active == ("default", "other")
    assert lora_layers(model)["layers.0.k"].active == ("other",)
    set_adapter(model, "default")
    assert torch.equal(model(tokens), first)


def test_names_of_adapters_are_checked(model):
    apply_lora(model, LoRAConfig(r=2, target_modules=["q"]))
    before = snapshot(model)
    for bad in ("default", "a.b"):
        with pytest.raises(ValueError, match="adapter_name"):
            apply_lora(model, LoRAConfig(r=2, target_modules=["k"]), bad)
    with pytest.raises(ValueError, match="expected one of default, got 'nope'"):
        set_adapter(model, "nope")
    assert snapshot(model) == before


def test_shared_linears_are_replaced_once(tokens):
    model = Model()
    model.layers[2].q = model.layers[0].q
    apply_lora(model, LoRAConfig(r=2, target_modules=["q"]))
    assert isinstance(model.layers[0].q, LoRALinear) and model.layers[2].q is model.layers[0].q
    remove_lora(model)
    assert type(model.layers[0].q) is nn.Linear and model.layers[2].q is model.layers[0].q


def test_tied_weights_stay_tied():
    model = Model()
    model.head.weight = model.embed.weight
    apply_lora(model, LoRAConfig(r=2, target_modules=["head"], init_lora_weights=False))
    before = model.embed.weight.clone()
    merge_adapters(model)
    assert torch.equal(model.embed.weight, before)
    unmerge_adapters(model)
    assert model.head.weight is model.embed.weight


def test_merge_disable_remove(model, tokens):
    base = model(tokens)
    plain = snapshot(model)[0]
    weight = model.layers[0].q.weight
    apply_lora(model, LoRAConfig(r=2, target_modules="all-linear"))
    shake(model)
    adapted = model(tokens)
    with disable_adapters(model):
        assert torch.equal(model(tokens), base)
    merge_adapters(model)
    torch.testing.assert_close(model(tokens), adapted)
    unmerge_adapters(model)
    assert torch.equal(model(tokens), adapted)
    folded = remove_lora(copy.deepcopy(model), merge=True)
    torch.testing.assert_close(folded(tokens), adapted)
    remove_lora(model)
    assert snapshot(model)[0] == plain and snapshot(folded)[0] == plain
    assert model.layers[0].q.weight is weight and not lora_configs(model)
    assert torch.equal(model(tokens), base)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_models_are_copied_whole(model, tokens, clone):
    apply_lora(model, LoRAConfig(r=2, target_modules=["q"]))
    shake(model)
    other = clone(model)
    assert torch.equal(other(tokens), model(tokens))
    assert lora_configs(other) == lora_configs(model)


def test_counts(model, capsys):
    apply_lora(model, LoRAConfig(r=2, target_modules=["q"]))
    trainable, total = count_parameters(model)
    assert trainable == 3 * 2 * (8 + 8)
    assert total == sum(p.numel() for p in model.parameters())
    print_trainable_parameters(model)
    printed = capsys.readouterr().out
    assert re.findall(r"[\d,.]+", printed)[:2] == [f"{trainable:,}", f"{total:,}"]
    assert f"{100 * trainable / total:.4f}%" in printed


def test_training_lowers_the_loss_and_spares_the_base(model, tokens):
    apply_lora(model, LoRAConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_torch_encoder_layers_call_their_adapters_in_inference_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    apply_lora(model, LoRAConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False))
    x = torch.randn(2, 3, 8)
    want = model(x)
    with torch.no_grad():  # where torch would take a path that reads the weights alone
        torch.testing.assert_close(model(x), want)
        with disable_adapters(model):
            assert not torch.allclose(model(x), want)
    remove_lora(model)
    assert not model.layers[0].linear1._forward_pre_hooks
