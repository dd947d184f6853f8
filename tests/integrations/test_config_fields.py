"""The fields of PEFT's LoraConfig that ours has too: equal outputs, files both ways, bad input by name."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter
from lora_kernels.nn import (
    delete_adapter,
    disable_adapters,
    lora_layers,
    merge_adapters,
    remove_lora,
    unmerge_adapters,
)
from lora_kernels.nn.invocation import _Finder

TABLE = Path(__file__).parents[2] / "docs" / "lora_config.md"
INVOCATION = [5, 9]
OPTIONS = {"r": 4, "lora_alpha": 6}
TOKENS = {"target_modules": ["q_proj"], "trainable_token_indices": [12, 3, 20]}
FIELDS = {
    "trainable_token_indices": TOKENS,
    "tied": {**TOKENS, "bias": "all"},
    "by name": {**TOKENS, "trainable_token_indices": {"embed_tokens": [9, 12], "lm_head": [5]}},
    "lora_bias": {"target_modules": ["fc", "conv"], "lora_bias": True},
    "alora_invocation_tokens": {
        "target_modules": ["q_proj", "up_proj", "lm_head"],
        "alora_invocation_tokens": INVOCATION,
    },
}


class Net(nn.Module):
    """A linear and a convolution with biases."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv = nn.Linear(6, 8), nn.Conv1d(8, 5, 3, padding=1)

    def forward(self, x):
        return self.conv(self.fc(x).tanh().mT)


def llama(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **options)).eval()


def base_of(field):
    torch.manual_seed(0)
    return Net().eval() if field == "lora_bias" else llama(tie_word_embeddings=field == "tied")


def inputs_of(field):
    torch.manual_seed(1)
    if field == "lora_bias":
        return {"x": torch.randn(2, 7, 6)}
    ids = torch.randint(10, 24, (3, 8))
    ids[0, 2:4] = ids[1, 1:3] = ids[1, 4:6] = torch.tensor(INVOCATION)  # one, two, and none in the last
    return {"input_ids": ids}


def randomise(model):
    torch.manual_seed(2)
    for _, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def y_of(model, inputs):
    y = model(**inputs)
    return y if isinstance(y, torch.Tensor) else y.logits


def theirs_of(field, **more):
    options = {**OPTIONS, **FIELDS[field], **more}
    task = "CAUSAL_LM" if field != "lora_bias" else None
    return randomise(get_peft_model(base_of(field), LoraConfig(task_type=task, **options)).eval())


@pytest.mark.filterwarnings("ignore:.*aLoRA")
@pytest.mark.parametrize("field", FIELDS)
def test_files_go_both_ways(field, tmp_path):
    theirs, inputs = theirs_of(field), inputs_of(field)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    model = load_adapter(base_of(field), tmp_path / "theirs").eval()
    expected = y_of(theirs, inputs)
    torch.testing.assert_close(y_of(model, inputs), expected)
    assert not torch.allclose(y_of(base_of(field), inputs), expected)
    save_adapter(model, tmp_path / "ours")
    files = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    back = PeftModel.from_pretrained(base_of(field), tmp_path / "ours").eval()
    torch.testing.assert_close(y_of(back, inputs), expected)


@pytest.mark.filterwarnings("ignore:.*aLoRA")
@pytest.mark.parametrize("field", FIELDS)
def test_gradients_are_peft_s(field, tmp_path):
    theirs, inputs = theirs_of(field).train(), inputs_of(field)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = load_adapter(base_of(field), tmp_path).train()
    for one in (theirs, model):
        y_of(one, inputs).square().mean().backward()
    save_gradients(theirs), save_gradients(model)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    save_adapter(model, tmp_path / "ours")
    files = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")]
    assert all(value.any() for value in files[0].values())
    torch.testing.assert_close(files[1], files[0])


@torch.no_grad()
def save_gradients(model):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.copy_(parameter.grad)


@pytest.mark.parametrize("field", ["lora_bias", "trainable_token_indices", "tied", "by name"])
def test_merged_disabled_and_removed(field):
    base, inputs = base_of(field), inputs_of(field)
    plain = y_of(base, inputs)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = randomise(apply_lora(base, LoRAConfig(**OPTIONS, **FIELDS[field])).eval())
    active = y_of(model, inputs)
    merge_adapters(model)
    torch.testing.assert_close(y_of(model, inputs), active)
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value)
    with disable_adapters(model):
        assert torch.equal(y_of(model, inputs), plain)
    unmerge_adapters(model)
    torch.testing.assert_close(y_of(model, inputs), active)
    merge_adapters(model)
    torch.testing.assert_close(y_of(remove_lora(model, merge=True), inputs), active)


def test_merging_a_bias_into_none_is_refused_and_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    randomise(apply_lora(model, LoRAConfig(target_modules=["0"], lora_bias=True)))
    x = torch.randn(2, 4)
    before = model(x)
    with pytest.raises(RuntimeError, match="lora_bias"):
        merge_adapters(model)
    assert torch.equal(model(x), before)


def test_alora_of_a_cache_is_that_of_the_whole():
    model = randomise(apply_lora(llama(), LoRAConfig(**OPTIONS, **FIELDS["alora_invocation_tokens"])).eval())
    ids = inputs_of("alora_invocation_tokens")["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :6], use_cache=True)
        second = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values)
    # Where there are two invocations the later one would take back what the first has written.
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)
    tokens = model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False)
    for i in range(8, 12):  # one after the other, without a cache
        assert model(input_ids=tokens[:, :i]).logits[0, -1].argmax() == tokens[0, i]
    delete_adapter(model, "default")
    assert not any(type(hook) is _Finder for hook in model._forward_pre_hooks.values())


@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": 1},
        {"lora_bias": True, "use_dora": True},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"alora_invocation_tokens": "ab"},
        {"alora_invocation_tokens": []},
        {"alora_invocation_tokens": [-1]},
        {"alora_invocation_tokens": [True]},
        {"alora_invocation_tokens": [3], "method": "lora_fa"},
        {"trainable_token_indices": [3, 3]},
        {"trainable_token_indices": {"embed_tokens": []}},
        {"trainable_token_indices": {3: [4]}},
    ],
    ids=str,
)
def test_a_bad_field_is_named(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        LoRAConfig(target_modules=["fc"], **options)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (lambda: nn.Sequential(nn.Embedding(5, 4)), {"target_modules": ["0"], "lora_bias": True}),
        (Net, {"target_modules": ["fc"], "alora_invocation_tokens": [3]}),
        (llama, {"target_modules": ["embed_tokens"], "alora_invocation_tokens": [3]}),
        (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [24]}),
        (llama, {"target_modules": ["embed_tokens"], "trainable_token_indices": [4]}),
        (llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"nothing": [4]}}),
    ],
    ids=[
        "bias of an embedding",
        "no input_ids",
        "aLoRA of an embedding",
        "too large",
        "adapted",
        "no module",
    ],
)
def test_what_does_not_fit_a_model_is_named_and_changes_nothing(base, options):
    model = base()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=list(options)[-1]):
        apply_lora(model, LoRAConfig(**options))
    assert [type(module) for module in model.modules()] == before
    assert not lora_layers(model)


def test_the_table_has_every_field_of_the_installed_peft():
    rows = [
        line.split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    named = {name: row[2].strip() for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    theirs = {one.name for one in dataclasses.fields(LoraConfig)}
    assert named.keys() == theirs
    ours = {one.name for one in dataclasses.fields(LoRAConfig)} - {"method", "method_options"}
    assert {name for name, has in named.items() if has == "yes"} == ours


@pytest.mark.parametrize("name", ["megatron_config", "layer_replication", "monteclora_config", "kasa_config"])
def test_what_we_have_not_is_refused_by_name(name, tmp_path):
    save_adapter(apply_lora(Net(), LoRAConfig(target_modules=["fc"])), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: [[0, 1]]}))
    model = Net()
    with pytest.raises(ValueError, match=name):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)


def test_rows_of_a_tied_head_are_one_parameter_and_no_weight_is_made():
    model = apply_lora(llama(tie_word_embeddings=True), LoRAConfig(**OPTIONS, **TOKENS))
    layers = lora_layers(model)
    rows = [layers[name].adapters["default"] for name in ("model.embed_tokens", "lm_head")]
    assert rows[0].trainable_tokens_delta is rows[1].trainable_tokens_delta and rows[1].tied
    assert torch.equal(rows[0].trainable_tokens_delta, model.lm_head.weight[[12, 3, 20]])
    assert sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "delta" in n) == 3 * 16
    padded = nn.Sequential(nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 4))
    apply_lora(padded, LoRAConfig(target_modules=["1"], trainable_token_indices={"0": [2, 5]}))
    padded(torch.tensor([2, 5, 1])).sum().backward()
    grad = padded[0].adapters["default"].trainable_tokens_delta.grad
    assert not grad[0].any() and grad[1].any()
