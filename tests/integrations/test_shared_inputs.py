"""Groups in Transformers models: found in each family, PEFT's numbers kept."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft_runs import assert_same_when_checkpointed, randomise, run

import lora_kernels.nn.groups as groups
import lora_kernels.nn.mlp as mlp
from lora_kernels import LoRAConfig, accelerate, apply_lora, decelerate
from lora_kernels.nn import fused_mlps, layer_groups
from lora_kernels.testing import assert_close

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FAMILIES = {
    "Llama": (QKV, MLP),
    "Qwen2": (QKV, MLP),
    "Qwen3": (QKV, MLP),
    "Mistral": (QKV, MLP),
    "Gemma": (QKV, MLP),
    "Bert": (("query", "key", "value"),),
}


def tiny(family):
    torch.manual_seed(0)
    sizes = dict(SIZES)
    if family == "Bert":
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes.pop("num_key_value_heads")
        return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    sizes |= {"head_dim": 8} if family in ("Gemma", "Qwen3") else {}
    config = getattr(transformers, f"{family}Config")(**sizes)
    return getattr(transformers, f"{family}Model")(config)


def last_names(found):
    return [tuple(name.rpartition(".")[2] for name in group) for group in found]


@pytest.fixture
def calls(monkeypatch):
    made, real = [], groups.fused_group
    monkeypatch.setattr(groups, "fused_group", lambda members: (made.append(len(members)), real(members))[1])
    return made


@pytest.fixture
def mlp_calls(monkeypatch):
    made, real = [], mlp.fused_mlp
    monkeypatch.setattr(mlp, "fused_mlp", lambda *args: (made.append(args[-1]), real(*args))[1])
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_model(family, tokens, calls, mlp_calls):
    model = get_peft_model(tiny(family), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    randomise(model)
    plain = copy.deepcopy(model)
    report = accelerate(model)
    assert last_names(report.groups) == list(FAMILIES[family]) * 2
    assert "groups that share an input" in str(report)
    assert {name.rpartition(".")[2] for name, _ in report.alone} <= {"o_proj", "down_proj"}
    ours, eager = run(model, tokens), run(plain, tokens)
    activation = [] if family == "Bert" else ["gelu_tanh" if family == "Gemma" else "silu"]
    assert calls == [3, 3] and mlp_calls == activation * 2
    assert len(report.mlps) == len(mlp_calls)
    exact = run(plain.double(), tokens)
    assert ours.keys() == exact.keys()
    for name in ours:
        assert_close(ours[name], eager[name], exact[name], name, ulps=4.0)
    decelerate(model)
    assert not layer_groups(model) and not fused_mlps(model)


def test_gradient_checkpointing_and_dropout(tokens):
    options = {"r": 4, "lora_dropout": 0.3, "target_modules": "all-linear"}
    model = get_peft_model(tiny("Llama"), LoraConfig(**options)).train()
    randomise(model)
    accelerate(model)
    assert_same_when_checkpointed(model, tokens)


def test_generate_and_peft_adapters(tokens, calls):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    randomise(model)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(input_ids=tokens, **options)
    report = accelerate(model)
    assert last_names(report.groups) == [("q_proj", "v_proj")] * 2
    assert torch.equal(model.generate(input_ids=tokens, **options), want)
    assert set(calls) == {2}
    calls.clear()
    with model.disable_adapter():
        model(input_ids=tokens)
    assert not calls
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=tokens, **options), want)


def test_an_mlp_without_an_adapter_on_down_is_a_group(tokens, calls, mlp_calls):
    targets = [*QKV, *MLP]
    model = get_peft_model(tiny("Llama"), LoraConfig(r=4, target_modules=targets))
    assert not accelerate(model).mlps
    run(model, tokens)
    assert calls == [3, 2, 3, 2] and not mlp_calls


def test_applied_model_has_the_same_groups(tokens, calls, mlp_calls):
    model = apply_lora(tiny("Qwen2"), LoRAConfig(r=4, target_modules="all-linear"))
    assert last_names(layer_groups(model)) == [QKV, MLP] * 2
    run(model, tokens)
    assert calls == [3, 3] and mlp_calls == ["silu"] * 2
