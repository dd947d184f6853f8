"""Initialisers on whole models: the start is the base, files go to PEFT and back, nothing of W is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft

from lora_kernels import LoRAConfig, apply_lora, calibrate, load_adapter, quantize_base, save_adapter
from lora_kernels.init import INITIALISERS
from lora_kernels.nn import remove_lora, set_adapter

TARGETS = ["up", "down"]
TAKING = ["olora", "clusters", "pissa", "pissa_niter_2", "milora", "corda", "lora_ga"]
QUIET = ["gaussian", "orthogonal", "asym", "mica", "eva"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 9)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def batches():
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, 15, 12, generator=generator) for _ in range(3)]


def statistics():
    every = ("covariance", "activation_svd", "gradient")
    return calibrate(Net(), batches(), every, forward=lambda m, x: m(x).square().mean())


def adapted(init, model=None, **options):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options
    config = LoRAConfig(init_lora_weights=init, **fields)
    return apply_lora(Net() if model is None else model, config, statistics=statistics())


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batches()[0]).square().mean().backward()
        optimizer.step()
    return model


X = torch.randn(3, 12, generator=torch.Generator().manual_seed(8))


def test_every_initialiser_is_here():
    inner = {"_true", "_false", "_niter", "loftq", "expressive"}
    assert {*TAKING, *QUIET} - {"pissa_niter_2"} == set(INITIALISERS) - inner


@pytest.mark.parametrize("init", [*TAKING, *QUIET])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"]
)
def test_it_starts_at_the_base_and_trains(init, options):
    base, model = Net(), adapted(init, **options)
    torch.testing.assert_close(model(X), base(X), rtol=1e-5, atol=1e-5)
    changed = not torch.equal(model.up.weight, base.up.weight)
    assert changed == (init in TAKING)
    assert torch.equal(model.up.bare_weight, base.up.weight)
    train(model)
    assert (model(X) - base(X)).abs().max() > 1e-4
    remove_lora(model)
    assert torch.equal(model.up.weight, base.up.weight) and torch.equal(model(X), base(X))


@pytest.mark.parametrize("init, frozen", [("mica", "lora_B"), ("asym", "lora_A")])
def test_a_frozen_factor_stays(init, frozen):
    model = adapted(init)
    adapter = model.up.adapters["default"]
    before = {name: p.clone() for name, p in adapter.named_parameters()}
    train(model)
    set_adapter(model, [])
    set_adapter(model, "default")
    for name, parameter in adapter.named_parameters():
        assert torch.equal(parameter, before[name]) == (name == frozen)
        assert parameter.requires_grad == (name != frozen)


@pytest.mark.parametrize("init", [*TAKING, *QUIET])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "rank_pattern": {"up": 2}, "alpha_pattern": {"up": 3}}, {"use_dora": True}],
    ids=["lora", "patterns", "dora"],
)
def test_peft_reads_it_onto_the_untouched_base(init, options, tmp_path):
    model = train(adapted(init, **options))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-5, atol=1e-5)
    assert (theirs(X) - Net()(X)).abs().max() > 1e-4


@pytest.mark.parametrize("init", [*TAKING, *QUIET])
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_it_goes_on_as_it_was(init, known, tmp_path):
    model = train(adapted(init))
    save_adapter(model, tmp_path)
    torch.manual_seed(77)
    other = load_adapter(adapted(init) if known else Net(), tmp_path)
    torch.testing.assert_close(other(X), model(X), rtol=1e-6, atol=1e-6)
    for one, same in zip(
        model.up.adapters["default"].parameters(), other.up.adapters["default"].parameters(), strict=True
    ):
        assert torch.equal(one, same) and one.shape[0] in (4, 20) and one.requires_grad == same.requires_grad
    for one in (model, other):
        train(one)
    torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.up.weight, model.up.weight, rtol=0, atol=1e-6)
    assert torch.equal(remove_lora(other).up.weight, Net().up.weight)


@pytest.mark.parametrize("init", TAKING)
def test_merged_it_is_one_weight(init):
    model = train(adapted(init))
    y = model(X)
    merged = remove_lora(copy.deepcopy(model), merge=True)
    torch.testing.assert_close(merged(X), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_what_peft_saved(init, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=init)
    theirs = train(peft.get_peft_model(Net(), config))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(Net(), tmp_path)
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-5, atol=1e-5)
    trains = {name for name, p in model.up.adapters["default"].named_parameters() if p.requires_grad}
    assert trains == ({"lora_A"} if init == "mica" else {"lora_A", "lora_B"})


@pytest.mark.parametrize(
    "init, options",
    [("corda", {"corda_method": "kpm"}), ("asym", {"train_a": True}), ("eva", {"whiten": True})],
)
def test_options_of_the_start_are_kept_with_it(init, options, tmp_path):
    model = train(adapted(init, method_options=options))
    save_adapter(model, tmp_path)
    other = load_adapter(Net(), tmp_path)
    torch.testing.assert_close(other(X), model(X), rtol=1e-6, atol=1e-6)
    assert [p.requires_grad for p in other.up.adapters.parameters()] == [True, True]


def test_what_serves_adapters_reads_the_plain_one(tmp_path):
    from lora_kernels.integrations.checkpoint import CONFIG, read_weights
    from lora_kernels.integrations.checkpoint_config import read_config

    save_adapter(train(adapted("corda", method_options={"corda_method": "kpm"})), tmp_path)
    config, tensors = read_config(tmp_path / CONFIG), read_weights(tmp_path)
    assert (config.r, config.lora_alpha, config.init_lora_weights, config.method_options) == (8, 12, True, {})
    assert tensors["base_model.model.up.lora_A.weight"].shape == (8, 12)
    assert len(tensors) == 4


def test_a_whole_state_dict_goes_on():
    model = train(adapted("pissa"))
    other = adapted("pissa")
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(X), model(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("double", [False, True])
def test_loftq_is_nearer_than_quantising(double, tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.up = nn.Linear(64, 128)

        def forward(self, x):
            return self.up(x)

    x = torch.randn(5, 64)
    base = Wide()
    config = LoRAConfig(
        r=8, lora_alpha=4, target_modules=["up"], init_lora_weights="loftq", method_options={"loftq_iter": 2}
    )
    model = apply_lora(Wide(), config)
    dense = model(x)
    quantize_base(model, "nf4")
    torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-4)  # quantising finds LoftQ's codes again
    plain = quantize_base(Wide(), "nf4")
    assert (model(x) - base(x)).norm() < 0.8 * (plain(x) - base(x)).norm()
    train_one = model.up.adapters["default"].lora_A
    with torch.no_grad():
        train_one.mul_(1.1)
    save_adapter(model, tmp_path)
    onto = quantize_base(Wide(), "nf4")
    if double:  # onto the dense base, from which LoftQ is computed again
        onto = Wide()
        torch.testing.assert_close(load_adapter(onto, tmp_path)(x), model(x), rtol=1e-4, atol=1e-4)
    else:  # onto a base that LoftQ left
        held = copy.deepcopy(model)
        plain_base = remove_lora(held)
        torch.testing.assert_close(load_adapter(plain_base, tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", TAKING)
def test_a_quantised_base_is_refused(init):
    model = quantize_base(nn.Sequential(nn.Linear(64, 64)))
    config = LoRAConfig(r=2, target_modules=["0"], init_lora_weights=init)
    x = torch.eye(64)
    given = {"0": {"covariance": x, "gradient": torch.randn(64, 64)}}
    before = model(x)
    with pytest.raises(ValueError, match="quantised"):
        apply_lora(model, config, statistics=given)
    assert torch.equal(model(x), before) and type(model[0]).__name__ == "QuantizedLinear"


BAD = {
    "statistics missing": (
        {"init_lora_weights": "corda"},
        None,
        ValueError,
        r"'corda' needs the statistic 'covariance' of up; gather it by .*calibrate",
    ),
    "of one layer": (
        {"init_lora_weights": "eva"},
        ["down"],
        ValueError,
        "'eva' needs the statistic 'activation_svd' of down",
    ),
    "no mapping": (
        {"init_lora_weights": "eva"},
        "x",
        TypeError,
        "statistics: expected those of calibrate, got str",
    ),
    "another method": (
        {"init_lora_weights": "pissa", "method": "sora"},
        None,
        ValueError,
        "sora expects True, False or 'gaussian', got 'pissa'",
    ),
    "nothing trains": (
        {"init_lora_weights": "mica", "method": "lora_fa"},
        None,
        ValueError,
        "expects a start of which a factor trains",
    ),
    "rank": (
        {"init_lora_weights": "olora", "r": 10},
        None,
        ValueError,
        "r: 'olora' expects at most 9 of down, got 10",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_changes_nothing(what):
    fields, given, error, message = BAD[what]
    found = statistics()
    found = (
        {name: tensors for name, tensors in found.items() if name not in given}
        if isinstance(given, list)
        else given
    )
    model = Net()
    with pytest.raises(error, match=message):
        apply_lora(model, LoRAConfig(**({"r": 4, "target_modules": TARGETS} | fields)), statistics=found)
    assert type(model.up) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(X), Net()(X))


def test_a_config_of_no_such_start():
    with pytest.raises(ValueError, match="init_lora_weights: expected one of True, False, pissa_niter_N"):
        LoRAConfig(init_lora_weights="pisa")
    with pytest.raises(TypeError, match="init_lora_weights: expected a bool or a str, got list"):
        LoRAConfig(init_lora_weights=[])
    with pytest.raises(ValueError, match="method_options: lora takes corda_method, got 'direction'"):
        LoRAConfig(init_lora_weights="corda", method_options={"direction": "ArBr"})


def test_a_checkpoint_of_another_start_replaces_it(tmp_path):
    """What was taken before goes back into W first."""
    model = train(adapted("pissa"))
    save_adapter(model, tmp_path)
    for other in (adapted("olora"), adapted(True)):
        load_adapter(other, tmp_path)
        torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-5)
        assert torch.equal(remove_lora(other).up.weight, Net().up.weight)


def test_drawing_anew_is_refused():
    model = adapted("pissa")
    with pytest.raises(RuntimeError, match="cannot draw W anew: 'default' has taken its start out of it"):
        model.up.reset_parameters()


def test_transposed_and_embedded_layers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.linear = nn.Embedding(30, 12), conv1d(8, 12)

        def forward(self, tokens):
            return self.linear(self.table(tokens))

    tokens = torch.arange(10).view(2, 5)
    for init in ("pissa", "olora", "milora"):
        model = apply_lora(
            Model(), LoRAConfig(r=4, target_modules=["table", "linear"], init_lora_weights=init)
        )
        torch.testing.assert_close(model(tokens), Model()(tokens), rtol=1e-5, atol=1e-5)
        assert not torch.equal(model.table.weight, Model().table.weight)
        assert model.table.adapters["default"].lora_A.count_nonzero() > 0


def test_convolutions_and_embeddings_go_to_peft_too(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.conv = nn.Embedding(30, 6), nn.Conv1d(5, 4, 3)

        def forward(self, tokens):
            return self.conv(self.table(tokens))

    tokens = torch.arange(10).view(2, 5)
    config = LoRAConfig(r=3, target_modules=["table", "conv"], init_lora_weights="milora")
    model = apply_lora(Model(), config)
    torch.testing.assert_close(model(tokens), Model()(tokens), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for layer in (model.table, model.conv):
            layer.adapters["default"].lora_B.mul_(1.5)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path)
    torch.testing.assert_close(theirs(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load_adapter(Model(), tmp_path)(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_embeddings_that_go_along_are_the_untouched_ones(tmp_path):
    from safetensors.torch import load_file

    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    weight = model.model.embed_tokens.weight.clone()
    config = LoRAConfig(r=4, target_modules=["embed_tokens"], init_lora_weights="pissa")
    apply_lora(model, config)
    save_adapter(model, tmp_path, save_embedding_layers=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not torch.equal(model.model.embed_tokens.weight, weight)
    assert torch.equal(saved["base_model.model.model.embed_tokens.base_layer.weight"], weight)
