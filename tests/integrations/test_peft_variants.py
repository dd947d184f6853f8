"""accelerate() on the variants and flags of PEFT's LoRA linear: PEFT's numbers, gradients and API."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from test_peft_tuners import FixedDropout, Model, assert_same_as_peft, shaken
from torch import nn

from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.reference.dropout import dropout_apply, dropout_mask

ROWS, WIDTH = 7, 12


class Case(NamedTuple):
    """Of a variant."""

    # Of the LoraConfig.
    options: dict
    # What each call of the model gets beside x.
    told: dict = {}  # noqa: RUF012
    # Whether PEFT has it for Conv1D, can merge it, and drops the branch's input as plain LoRA does.
    conv1d: bool = True
    merges: bool = True
    drops_input: bool = True


BLOCKS = {"target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"], "nblocks": 2}
VELORA = {"num_groups": 5, "init_type": "batch_average_once"}
CASES = {
    "lora_bias": Case({"lora_bias": True}),
    "mica": Case({"init_lora_weights": "mica"}),
    "kasa": Case({"kasa_config": KasaConfig()}, conv1d=False),
    "bdlora": Case({"use_bdlora": BdLoraConfig(**BLOCKS)}, conv1d=False),
    "velora": Case({"velora_config": VeloraConfig(**VELORA)}, drops_input=False),
    "monteclora": Case({"monteclora_config": MontecloraConfig(num_samples=3, buffer_size=4)}),
    "alora": Case(
        {"alora_invocation_tokens": [1, 2]},
        {"alora_offsets": [3, None, 9]},
        merges=False,
        drops_input=False,
    ),
    "arrow": Case({}, merges=False, drops_input=False),
    "dora": Case({"use_dora": True}),
}


class Told(nn.Module):
    """Calls the model of PEFT's with what every call gets, on [samples, tokens, features]."""

    def __init__(self, model, told):
        super().__init__()
        self.model, self.told = model, told

    def forward(self, x):
        samples = torch.stack([x, x.flip(0), x.roll(2, 0)])
        return self.model(samples, **self.told)


def wrapped(variant, kind="Linear", dropout=0.0):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], "lora_dropout": dropout}
    config = LoraConfig(**options, fan_in_fan_out=kind == "Conv1D", **CASES[variant].options)
    model = get_peft_model(Model(kind), config, adapter_name="task_0" if variant == "arrow" else "default")
    if variant == "arrow":
        add_router(model, options, kind)
    return Told(shaken(model, config), CASES[variant].told)


def add_router(model, options, kind):
    names = ["task_0", "task_1", "task_2"]
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**options, fan_in_fan_out=kind == "Conv1D"))
    arrow = ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=3)
    arrow.task_adapter_names = names
    config = LoraConfig(**options, fan_in_fan_out=kind == "Conv1D", arrow_config=arrow)
    model.add_adapter("arrow_router", config)
    model.set_adapter("arrow_router")
    for name, parameter in model.named_parameters():
        if any(f".{task}." in name for task in names):
            parameter.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("variant", CASES)
def test_outputs_and_gradients_are_pefts(variant, kind, dtype):
    if kind == "Conv1D" and not CASES[variant].conv1d:
        pytest.skip("PEFT has it for nn.Linear alone")
    if variant == "monteclora" and dtype == torch.bfloat16:
        pytest.skip("PEFT's own sampler multiplies float32 by bfloat16")
    model = wrapped(variant, kind).to(dtype)
    report = accelerate(model)
    assert len(report.accelerated) == 2 and not report.skipped, str(report)
    assert_same_as_peft(model, dtype)


class SameDropout:
    """F.dropout with bits that depend on the shape alone: as many times as it's called."""

    def __call__(self, x, p=0.5, training=True, inplace=False):
        if not training:
            return x
        generator = torch.Generator().manual_seed(5)
        keep = torch.rand(x.shape, generator=generator) >= p
        return x * (keep / (1 - p)).to(x)


@pytest.mark.parametrize("variant", CASES)
def test_dropout_is_pefts_but_for_the_bits(variant, monkeypatch):
    p, rows = 0.4, 3 * ROWS
    model = wrapped(variant, dropout=p).train()
    accelerate(model)
    if not CASES[variant].drops_input:
        if variant == "alora":  # which drops what tokens are left
            model.told = {"alora_offsets": [ROWS] * 3}
            model.model.base_model.model.first.lora_dropout["default"] = nn.Identity()
            model.model.base_model.model.second.lora_dropout["default"] = nn.Identity()
        monkeypatch.setattr(torch.nn.functional, "dropout", SameDropout())
        return assert_same_as_peft(model, torch.float32)
    seeds = [torch.empty(1, dtype=torch.int64) for _ in range(2)]
    torch.manual_seed(2)
    for seed in seeds:
        seed.random_()

    def fixed(peft):
        layers = peft.model.base_model.model
        for layer, seed, width in ((layers.first, seeds[0], WIDTH), (layers.second, seeds[1], 8)):
            mask = dropout_mask(seed, rows, width, p)
            layer.lora_dropout["default"] = FixedDropout(dropout_apply(torch.ones(rows, width), mask, p))
        return peft

    torch.manual_seed(2)
    assert_same_as_peft(model, torch.float32, fixed)


PAIRS = [("dora", "dora"), ("kasa", "kasa"), ("mica", "dora"), ("velora", "mica"), ("alora", "lora_bias")]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_several_adapters_are_pefts(pair, monkeypatch):
    """One after the other, of several kinds, where what each makes of those before it counts."""
    model = wrapped(pair[0]).train()
    with_other(model, pair[1])
    accelerate(model)
    model.told = CASES["alora"].told if "alora" in pair else {}
    assert_same_as_peft(model, torch.float32)
    only_ours(monkeypatch)
    model(torch.zeros(ROWS, WIDTH))


def with_other(model, variant, dropout=0.0):
    options = {"r": 2, "target_modules": ["first", "second"], "lora_dropout": dropout}
    config = LoraConfig(**options, **CASES[variant].options)
    model.model.add_adapter("other", config)
    shaken(model.model, config)
    model.model.base_model.set_adapter(["default", "other"])


def only_ours(monkeypatch):
    """PEFT's own forward of a linear is no longer there."""
    monkeypatch.setattr(PeftLinear, "forward", None)


def test_two_adapters_with_dora_under_dropout_are_pefts(monkeypatch):
    model = wrapped("dora", dropout=0.4).train()
    with_other(model, "dora", dropout=0.4)
    accelerate(model)
    monkeypatch.setattr(torch.nn.functional, "dropout", SameDropout())
    assert_same_as_peft(model, torch.float32)


@pytest.mark.parametrize("names", [["default", "other", "__base__"], ["other", "default", "default"]])
@pytest.mark.parametrize("pair", [("kasa", "kasa"), ("alora", "bdlora"), ("mica", "alora")], ids="-".join)
def test_mixed_batches_are_pefts(pair, names, monkeypatch):
    model = wrapped(pair[0])
    with_other(model, pair[1])
    accelerate(model.eval())
    model.told = {"adapter_names": names}
    if "alora" in pair:
        model.told["alora_offsets"] = CASES["alora"].told["alora_offsets"]
    assert_same_as_peft(model, torch.float32)
    only_ours(monkeypatch)
    model(torch.zeros(ROWS, WIDTH))


@pytest.mark.parametrize("variant", ["dora", "arrow", "lora_bias"])
def test_mixed_batches_of_other_variants_are_as_in_peft(variant):
    """PEFT's error, or its numbers."""
    model = wrapped(variant)
    name = "arrow_router" if variant == "arrow" else "default"
    accelerate(model.eval())
    model.told = {"adapter_names": [name, "__base__", name]}
    if variant == "dora":
        with pytest.raises(ValueError, match="DoRA is enabled"):
            model(torch.zeros(ROWS, WIDTH))
    else:
        assert_same_as_peft(model, torch.float32)


def outputs(model):
    with torch.no_grad():
        return model(torch.linspace(-2, 2, ROWS * WIDTH).sin().view(ROWS, WIDTH))


@pytest.mark.parametrize("variant", CASES)
def test_pefts_api_goes_on_working(variant):
    """Disabled, merged and not again, copied, pickled, given back."""
    model = wrapped(variant).eval()
    accelerate(model)
    before = outputs(model)
    with model.model.disable_adapter():
        assert not torch.allclose(outputs(model), before)
    if CASES[variant].merges:
        merged = copy.deepcopy(model)
        for change in (merged.model.merge_adapter, merged.model.unmerge_adapter):
            change()
            torch.testing.assert_close(outputs(merged), before, rtol=1e-4, atol=1e-4)
    model.model.base_model.model = pickle.loads(pickle.dumps(model.model.base_model.model))
    torch.testing.assert_close(outputs(model), before)
    assert decelerate(model) == 2
    torch.testing.assert_close(outputs(model), before)


@pytest.mark.parametrize("variant", [name for name in CASES if name != "monteclora"])
def test_torch_compile_traces_a_layer_whole(variant):
    """MonteCLoRA's sampler keeps a count and draws with torch.distributions, in PEFT's forward as well."""
    model = wrapped(variant).eval()
    accelerate(model)
    before = outputs(model)  # what Arrow and VeLoRA set up at the first call is there then
    layer = model.model.base_model.model.first
    x = torch.linspace(-2, 2, 3 * ROWS * WIDTH).sin().view(3, ROWS, WIDTH)
    compiled = torch.compile(lambda x: layer(x, **CASES[variant].told), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x, **CASES[variant].told))
    assert before.isfinite().all()


def test_what_a_deferred_truncation_of_kasa_left_is_done():
    """PEFT takes W's smallest components away at the first call where it had no weight before."""
    model = wrapped("kasa")
    for layer in (model.model.base_model.model.first, model.model.base_model.model.second):
        layer.base_layer.weight.data += torch.eye(*layer.base_layer.weight.shape)
        layer._lora_kasa_truncation_deferred.add("default")
    accelerate(model)
    assert_same_as_peft(model, torch.float32)
