"""accelerate(): PEFT's numbers and PEFT's API."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_runs import assert_same_when_checkpointed, randomise, run
from torch import nn

from lora_kernels import dora_linear
from lora_kernels.integrations.peft import FusedLoraLinear, accelerate, decelerate
from lora_kernels.reference.dropout import dropout_apply, dropout_mask
from lora_kernels.testing import assert_close

TARGETS = ["query", "value", "dense"]


def wrap(model, **options):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options})
    model = get_peft_model(model, config)
    randomise(model)
    return model


def assert_same_as_peft(model, tokens):
    exact_model = copy.deepcopy(model)
    decelerate(exact_model)
    eager = run(exact_model, tokens)
    exact = run(exact_model.double(), tokens)
    ours = run(model, tokens)
    assert ours.keys() == eager.keys()
    for name in ours:
        assert_close(ours[name], eager[name], exact[name], name, ulps=4.0)


def test_torch_compile_traces_an_accelerated_model_whole(bert, tokens):
    model = wrap(bert())
    accelerate(model)
    eager = run(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    traced = run(compiled, tokens)
    for name, value in eager.items():
        torch.testing.assert_close(traced[f"_orig_mod.{name}" if name != "y" else name], value)


class Writing(nn.Module):
    """Query and value share x, and something is written in place between their calls."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.query(x)
        y = y.clone()
        y += 1
        return y + self.value(x)


def test_the_report_says_what_compiled_models_compute_alone(bert):
    model = get_peft_model(Writing(), LoraConfig(r=2, target_modules=["query", "value"]))
    report = accelerate(model)
    assert report.groups == [("base_model.model.query", "base_model.model.value")]
    reason = "alone when compiled, something is written in place between the calls"
    assert str(report).splitlines()[1:] == [f"  {name}: {reason}" for name in report.groups[0]]
    model = wrap(bert())
    before = [type(module) for module in model.modules()]
    report = accelerate(model)
    assert not report.alone_compiled and "when compiled" not in str(report)
    assert [type(module) for module in model.modules()] != before
    decelerate(model)
    assert [type(module) for module in model.modules()] == before


def test_outputs_and_all_gradients_are_pefts(bert, tokens):
    model = wrap(bert())
    report = accelerate(model)
    assert len(report.accelerated) == 2 * 5 and not report.skipped
    assert all(type(m) is FusedLoraLinear for m in model.modules() if isinstance(m, PeftLinear))
    assert_same_as_peft(model, tokens)


def test_the_fused_op_is_what_runs(bert, tokens, monkeypatch):
    calls = []
    import lora_kernels.integrations.peft_linear as module

    real = module.fused
    monkeypatch.setattr(module, "fused", lambda *args: (calls.append(1), real(*args))[1])
    model = wrap(bert())
    accelerate(model)
    model(input_ids=tokens)
    assert len(calls) == 3 * 2, "query and value are computed as a group"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_is_pefts(bert, tokens, dropout, monkeypatch):
    import lora_kernels.integrations.peft_linear as module

    calls, real = [], module.fused_dora
    monkeypatch.setattr(module, "fused_dora", lambda *args: (calls.append(1), real(*args))[1])
    model = wrap(bert(), use_dora=True, lora_dropout=dropout).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.linspace(0.5, 1.5, len(parameter))
    assert len(accelerate(model).accelerated) == 10
    assert_same_as_peft(model, tokens)
    assert len(calls) == 10


class FixedDropout(nn.Module):
    """Dropout by given keep bits."""

    def __init__(self, mask, p):
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x):
        return dropout_apply(x, self.mask, self.p)


def test_dora_under_dropout_is_pefts_function():
    """The oracle of dora_linear's tests against PEFT itself, both with the same mask."""
    p, base = 0.3, nn.Linear(10, 6).double()
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=p, target_modules=["linear"], use_dora=True)
    layer = (
        get_peft_model(nn.ModuleDict({"linear": base}), config).base_model.model["linear"].double().train()
    )
    randomise_all(layer)
    torch.manual_seed(2)
    seed = torch.empty(1, dtype=torch.int64).random_()
    layer.lora_dropout["default"] = FixedDropout(dropout_mask(seed, 8, 10, p), p)
    x = torch.randn(8, 10, dtype=torch.float64, requires_grad=True)
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    inputs, found = (x, lora_a, lora_b, magnitude), []
    for call in (
        lambda: layer(x),
        lambda: dora_linear(x, base.weight, lora_a, lora_b, magnitude, 2.0, base.bias, dropout_p=p),
    ):
        torch.manual_seed(2)
        y = call()
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_two_adapters_with_dora_are_pefts(bert, tokens):
    model = wrap(bert(), use_dora=True)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    randomise(model)
    accelerate(model)
    model.base_model.set_adapter(["default", "other"])
    assert_same_as_peft(model, tokens)


@pytest.mark.parametrize("use_dora", [False, True])
def test_conv1d_of_gpt2(gpt2, tokens, use_dora):
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": use_dora}
    model = wrap(gpt2(), **options)
    report = accelerate(model)
    assert len(report.accelerated) == 4 and not report.skipped
    assert_same_as_peft(model, tokens)


def test_two_active_adapters_are_one_call(bert, tokens):
    model = wrap(bert())
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    accelerate(model)
    assert_same_as_peft(model, tokens)


def test_set_adapter_and_disable_adapter(bert, tokens):
    model = wrap(bert())
    model.add_adapter("other", LoraConfig(r=3, target_modules=TARGETS))
    randomise(model)
    accelerate(model)
    first = model(input_ids=tokens).last_hidden_state
    model.set_adapter("other")
    assert not torch.equal(first, model(input_ids=tokens).last_hidden_state)
    assert_same_as_peft(model, tokens)
    with model.disable_adapter():
        plain = model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(plain, bert()(input_ids=tokens).last_hidden_state)


def test_dropout_trains_and_follows_the_seed(bert, tokens):
    model = wrap(bert(), lora_dropout=0.5).train()
    accelerate(model)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(run(model, tokens))
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    assert not torch.equal(draws[0]["y"], draws[2]["y"])
    model.eval()
    assert_same_as_peft(model, tokens)


def test_two_adapters_with_dropout_average_to_no_dropout(bert, tokens):
    layer = wrap(bert(), lora_dropout=0.5)
    layer.add_adapter("other", LoraConfig(r=3, lora_dropout=0.25, target_modules=TARGETS))
    randomise(layer)
    layer.base_model.set_adapter(["default", "other"])
    accelerate(layer)
    linear = next(m for m in layer.modules() if isinstance(m, FusedLoraLinear))
    x = torch.randn(1, linear.in_features).expand(20000, -1)
    expected = linear.eval()(x[:1])
    mean = linear.train()(x).mean(0)
    spread = linear(x).std(0) / 20000**0.5
    assert ((mean - expected).abs() <= 5 * spread + 1e-5).all()


def test_merge_save_and_reload(bert, tokens, tmp_path):
    model = wrap(bert())
    accelerate(model)
    expected = model(input_ids=tokens).last_hidden_state
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(bert(), tmp_path)
    torch.testing.assert_close(reloaded(input_ids=tokens).last_hidden_state, expected, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_pickle_and_deepcopy(bert, tokens):
    model = wrap(bert())
    accelerate(model)
    expected = model(input_ids=tokens).last_hidden_state
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(input_ids=tokens).last_hidden_state, expected)


def test_decelerate_gives_the_classes_back(bert):
    model = wrap(bert())
    before = [type(m) for m in model.modules()]
    accelerate(model)
    assert decelerate(model) == 10
    assert [type(m) for m in model.modules()] == before


def test_gradient_checkpointing(bert, tokens):
    model = wrap(bert(), lora_dropout=0.5).train()
    accelerate(model)
    assert_same_when_checkpointed(model, tokens)


def test_what_is_unsupported_stays_pefts(bert, tokens):
    model = wrap(bert())
    for layer in model.modules():
        if isinstance(layer, PeftLinear):
            layer.lora_dropout["default"] = nn.AlphaDropout(0.5)
    model.eval()
    before = run(model, tokens)
    report = accelerate(model)
    assert not report.accelerated and len(report.skipped) == 10
    assert all(reason for _, reason in report.skipped)
    after = run(model, tokens)
    assert all(torch.equal(before[name], after[name]) for name in before)


def randomise_all(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "magnitude" in name:
            parameter.data *= torch.linspace(0.5, 1.5, parameter.numel()).view(parameter.shape)
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_embeddings_are_pefts(bert, tokens, use_dora):
    options = {"target_modules": ["word_embeddings", "query"], "use_dora": use_dora}
    model = randomise_all(wrap(bert(), **options))
    report = accelerate(model)
    assert len(report.accelerated) == 3 and not report.skipped
    assert_same_as_peft(model, tokens)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["word_embeddings"]))
    randomise_all(model)
    model.base_model.set_adapter(["default", "other"])
    assert_same_as_peft(model, tokens)


class Convolutions(nn.Module):
    """Like a model that takes ``input_ids`` and has a hidden state, as the checks here want it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv1d(7, 6, 3, stride=2, padding=1), nn.Conv2d(1, 4, (2, 3))
        self.conv3, self.grouped = nn.Conv3d(1, 2, (2, 2, 1)), nn.Conv1d(6, 6, 1, groups=2)

    def forward(self, input_ids):
        x = torch.sin(input_ids[..., None] * torch.arange(1, 9)).to(self.conv1.weight.dtype)
        y = self.conv3(self.conv2(self.grouped(self.conv1(x))[:, None])[:, None])
        return SimpleNamespace(last_hidden_state=y)


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_are_pefts(tokens, use_dora):
    options = {"target_modules": ["conv1", "conv2", "conv3"], "use_dora": use_dora, "r": 4}
    model = randomise_all(get_peft_model(Convolutions(), LoraConfig(**options)))
    report = accelerate(model)
    assert len(report.accelerated) == 3 and not report.skipped
    assert_same_as_peft(model, tokens)
    before = [type(module) for module in model.modules()]
    assert decelerate(model) == 3
    accelerate(model)
    assert [type(module) for module in model.modules()] == before


def test_convolutions_with_groups_stay_pefts(tokens):
    model = get_peft_model(Convolutions(), LoraConfig(r=4, target_modules=["conv1", "grouped"]))
    report = accelerate(model)
    assert len(report.accelerated) == 1 and "groups" in report.skipped[0][1]
    model(input_ids=tokens)


def test_hooks_inside_send_a_call_to_peft(bert, tokens):
    model = wrap(bert())
    accelerate(model)
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(1))
    model(input_ids=tokens)
    assert seen == [1]


def test_half_precision_base_with_float32_adapters(bert, tokens):
    model = wrap(bert(torch.bfloat16))
    accelerate(model)
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == torch.float32
    assert model(input_ids=tokens).last_hidden_state.dtype == torch.bfloat16
    assert_same_as_peft(model, tokens)


def test_bad_models():
    with pytest.raises(ValueError, match="model: expected a model with layers of PEFT's"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        accelerate("model")
