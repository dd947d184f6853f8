"""All that a checkpoint says is used, or the file is refused; PEFT is the oracle, both ways."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter
from lora_kernels.nn import (
    disable_adapters,
    lora_configs,
    lora_layers,
    merge_adapters,
    remove_lora,
    set_adapter,
)

IDS = torch.arange(12).view(2, 6)
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie", "ignore:Setting `save", "ignore:Could not find"
)


def llama(tie=False, resized=None):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tie)).eval()
    if resized is not None:
        torch.manual_seed(resized)
        model.resize_token_embeddings(70, mean_resizing=False)
    return model


def shake(model, seed=1, parts=("lora_", "modules_to_save")):
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad or any(part in name for part in parts):
            p.data += 0.2 * torch.randn_like(p)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def theirs(folder, base, seed=1, **options):
    """A PEFT adapter on disk, and what its model computes."""
    peft = shake(
        get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})).eval(), seed
    )
    peft.save_pretrained(folder)
    return logits(peft)


def ours(**options):
    return shake(apply_lora(llama(), LoRAConfig(**{"r": 4, "target_modules": ["q_proj"], **options})))


SETTINGS = {
    "alpha": {"lora_alpha": 32},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "rank": {"r": 7},
    "pattern": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}},
    "targets": {"target_modules": ["q_proj", "down_proj"]},
    "fewer targets": {"target_modules": r".*layers\.1.*q_proj"},
    "DoRA": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("active", [True, False])
def test_a_file_over_an_adapter_says_what_it_is(tmp_path, options, active):
    want = theirs(tmp_path, llama(), **options)
    model = ours(lora_alpha=5)
    if not active:
        apply_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]), "other")
        set_adapter(model, "other")
        before = logits(model)
    trains = {n for n, p in model.named_parameters() if p.requires_grad and "other" in n}
    load_adapter(model, tmp_path)
    assert trains == {n for n, p in model.named_parameters() if p.requires_grad and "other" in n}
    if not active:
        assert torch.equal(logits(model), before)
        set_adapter(model, "default")
    close(logits(model), want)
    fresh = load_adapter(llama(), tmp_path)
    for at, layer in lora_layers(fresh).items():
        one, other = layer.adapters["default"], lora_layers(model)[at].adapters["default"]
        assert (one.scaling, one.lora_dropout, one.r) == (other.scaling, other.lora_dropout, other.r)
    save_adapter(model, tmp_path / "again")
    close(logits(PeftModel.from_pretrained(llama(), tmp_path / "again").eval()), want)


def test_tensors_stay_where_only_settings_differ(tmp_path):
    theirs(tmp_path, llama(), lora_alpha=32)
    model = ours(lora_alpha=5)
    before = {name: id(p) for name, p in model.named_parameters()}
    load_adapter(model, tmp_path)
    assert {name: id(p) for name, p in model.named_parameters()} == before


OWNED = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"modules_to_save": ["layernorm"]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("options", OWNED.values(), ids=OWNED)
@pytest.mark.parametrize("tie", [False, True])
def test_whole_modules_go_both_ways(tmp_path, options, tie):
    want = theirs(tmp_path, llama(tie), **options)
    model = load_adapter(llama(tie), tmp_path)
    close(logits(model), want)
    save_adapter(model, tmp_path / "ours")
    files = [load_file(tmp_path / side / WEIGHTS) for side in (".", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    close(logits(PeftModel.from_pretrained(llama(tie), tmp_path / "ours").eval()), want)
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(llama(tie)))


def test_tied_adapters_are_refused(tmp_path):
    theirs(tmp_path, llama(True), target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        load_adapter(llama(True), tmp_path)


def test_adapters_with_different_modules_come_one_after_the_other(tmp_path):
    wants = {
        name: theirs(tmp_path / name, llama(), seed, **options)
        for seed, (name, options) in enumerate(OWNED.items())
        if name != "tied"
    }
    model = llama()
    for name in wants:
        load_adapter(model, tmp_path / name, name)
    for name in (*wants, *reversed(wants)):
        set_adapter(model, name)
        close(logits(model), wants[name])


def bert(labels=2):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4, num_labels=labels)).eval()


def test_the_heads_of_other_model_classes_are_not_missed(tmp_path):
    want = theirs(tmp_path, bert(), task_type="SEQ_CLS", target_modules=["query"])
    close(logits(load_adapter(bert(), tmp_path)), want)


def test_a_head_of_another_size_is_refused(tmp_path):
    theirs(tmp_path, bert(3), task_type="SEQ_CLS", target_modules=["query"])
    refused(bert(), tmp_path, "classifier.weight: expected a floating tensor of shape")


RESIZED = {
    "targeted": ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "head targeted": ({"target_modules": ["lm_head", "embed_tokens"]}, {}),
    "beside": ({"target_modules": ["q_proj"]}, {"save_embedding_layers": True}),
}


@pytest.mark.parametrize("options,how", RESIZED.values(), ids=RESIZED)
@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_beside_an_adapter_are_its_own(tmp_path, options, how, tie):
    ids = torch.tensor([[1, 66, 67, 68]])
    peft = shake(get_peft_model(llama(tie, 10), LoraConfig(r=4, **options)).eval())
    peft.save_pretrained(tmp_path, **how)
    # Of an untied model PEFT leaves out the half that it does not adapt.
    want = logits(PeftModel.from_pretrained(llama(tie, 99), tmp_path).eval(), ids)
    if tie or how:
        close(logits(peft, ids), want)
    model = load_adapter(llama(tie, 99), tmp_path)
    close(logits(model, ids), want)
    with disable_adapters(model):
        assert torch.equal(logits(model, ids), logits(llama(tie, 99), ids))
    save_adapter(model, tmp_path / "ours")
    close(logits(PeftModel.from_pretrained(llama(tie, 99), tmp_path / "ours").eval(), ids), want)
    same = load_adapter(llama(tie, 10), tmp_path)
    assert not any("lora_owned" in name for name, _ in same.named_modules())  # the model has them already
    refused(llama(tie), tmp_path, "has to be resized")


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("tie", [False, True])
def test_resized_embeddings_are_written_where_asked_for(tmp_path, tie, targets):
    ids = torch.tensor([[1, 66, 67, 68]])
    model = shake(apply_lora(llama(tie, 10), LoRAConfig(r=4, target_modules=targets)))
    save_adapter(model, tmp_path, save_embedding_layers=True)
    want = logits(model, ids)
    close(logits(load_adapter(llama(tie, 99), tmp_path), ids), want)
    close(logits(PeftModel.from_pretrained(llama(tie, 99), tmp_path).eval(), ids), want)
    plain = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="save_embedding_layers"):
        save_adapter(plain, tmp_path, save_embedding_layers=True)


def test_a_plain_adapter_fits_a_resized_model(tmp_path):
    theirs(tmp_path, llama())
    load_adapter(llama(resized=3), tmp_path)


def wrap_whole(model):
    return torch.compile(model, backend="eager")


def wrap_part(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def wrap_projection(model):
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.compile(attention.q_proj, backend="eager")
    return model


def wrap_parallel(model):
    return nn.DataParallel(model)


def wrap_checkpoint(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return model


WRAPS = [wrap_whole, wrap_part, wrap_projection, wrap_parallel, wrap_checkpoint]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"], "bias": "all"}], ids=str)
def test_wrappers_leave_no_trace_in_names(tmp_path, wrap, options):
    want = theirs(tmp_path / "theirs", llama(), **options)
    loaded = load_adapter(wrap(llama()), tmp_path / "theirs")  # read into what is wrapped
    assert lora_configs(loaded).keys() == {"default"}
    save_adapter(loaded, tmp_path / "wrapped")
    late = wrap(load_adapter(llama(), tmp_path / "theirs"))  # written from what is wrapped since
    save_adapter(late, tmp_path / "late")
    for side in ("wrapped", "late"):
        close(logits(PeftModel.from_pretrained(llama(), tmp_path / side).eval()), want)


@pytest.mark.parametrize(
    "place",
    [
        "_orig_mod.base_model.model.",
        "base_model.model._orig_mod.",
        "base_model.model._fsdp_wrapped_module.",
        "module.base_model.model.",
        "base_model.model.module.",
    ],
)
def test_names_of_wrappers_in_a_file_are_left_out(tmp_path, place):
    want = theirs(tmp_path, llama())
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k.replace("base_model.model.", place, 1): t for k, t in tensors.items()}, tmp_path / WEIGHTS)
    close(logits(load_adapter(llama(), tmp_path)), want)


def test_full_names_are_found_in_a_compiled_model():
    name = "model.layers.0.self_attn.q_proj"
    model = apply_lora(
        wrap_whole(wrap_part(llama())), LoRAConfig(r=2, target_modules=[name], rank_pattern={name: 3})
    )
    (layer,) = lora_layers(model).values()
    assert layer.adapters["default"].r == 3


def test_renamed_prefixes_are_mapped(tmp_path):
    want = theirs(tmp_path, llama())
    tensors = load_file(tmp_path / WEIGHTS)
    start, before = "base_model.model.model.", "base_model.model.language_model.model."
    old = {key.replace(start, before): tensor for key, tensor in tensors.items()}
    save_file(old, tmp_path / WEIGHTS)
    refused(llama(), tmp_path, "missing")
    mapping = {r"^language_model\.model\.": "model."}
    close(logits(load_adapter(llama(), tmp_path, key_mapping=mapping)), want)
    model = llama()
    model._checkpoint_conversion_mapping = mapping
    close(logits(load_adapter(model, tmp_path)), want)
    refused(llama(), tmp_path, "two of", key_mapping={r"layers\.\d": "layers.0", r"^language_model\.": ""})
    refused(llama(), tmp_path, "regular expressions", key_mapping={"(": ""})
    refused(llama(), tmp_path, "key_mapping: expected a mapping", error=TypeError, key_mapping="a")


def state_of(model):
    flags = [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]
    modules = [(name, type(m), m.training) for name, m in model.named_modules()]
    return modules, flags, {key: value.clone() for key, value in model.state_dict().items()}


def refused(model, folder, match, error=ValueError, **options):
    for one in (model, shake(apply_lora(llama(), LoRAConfig(r=4, target_modules=["q_proj"])))):
        modules, flags, tensors = state_of(one)
        with pytest.raises(error, match=match):
            load_adapter(one, folder, **options)
        after = state_of(one)
        assert after[:2] == (modules, flags)
        assert all(torch.equal(after[2][key], value) for key, value in tensors.items())
        if not isinstance(model, LlamaForCausalLM):
            return


FOREIGN = {
    "kohya": {
        "lora_unet_0.lora_down.weight": torch.ones(2, 4),
        "lora_unet_0.lora_up.weight": torch.ones(4, 2),
    },
    "diffusers": {"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 4)},
}


@pytest.mark.parametrize("tensors", FOREIGN.values(), ids=FOREIGN)
def test_other_layouts_are_refused_by_name(tmp_path, tensors):
    theirs(tmp_path, llama())
    save_file(tensors, tmp_path / WEIGHTS)
    refused(llama(), tmp_path, "expected PEFT's layout")
    refused(llama(), tmp_path / WEIGHTS, "expected tensors of layers of the model, got . unknown keys")
    (tmp_path / "x.txt").write_text("x")
    refused(llama(), tmp_path / "x.txt", "expected a folder")


@pytest.mark.parametrize("option", ["kasa_config", "an_option_of_tomorrow", "trainable_token_indices"])
def test_options_that_are_not_known_are_refused(tmp_path, option):
    theirs(tmp_path, llama())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: {"x": 1}}))
    refused(llama(), tmp_path, option)


@pytest.mark.parametrize("method", ["lora", "lora_xs", "sora", "dora"])
def test_loading_draws_nothing(tmp_path, monkeypatch, method):
    model = ours(method=method)
    save_adapter(model, tmp_path)
    calls = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda a, **o: calls.append(a.device.type) or svd(a, **o))
    state = torch.get_rng_state()
    fresh = load_adapter(llama(), tmp_path)
    load_adapter(model, tmp_path)
    if method != "lora_xs":
        base = llama()
        torch.set_rng_state(state)
        load_adapter(base, tmp_path)
        assert torch.equal(torch.get_rng_state(), state)
    assert "cpu" not in calls
    close(logits(fresh), logits(model))


def test_a_merged_adapter_is_not_replaced(tmp_path):
    theirs(tmp_path, llama(), r=7)
    model = ours()
    merge_adapters(model)
    before = logits(model)
    with pytest.raises(RuntimeError, match="merged"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_merging_a_tied_head_spares_the_embedding(tmp_path):
    theirs(tmp_path, llama(True), target_modules=["lm_head"])
    model = load_adapter(llama(True), tmp_path)
    before = model.model.embed_tokens.weight.clone()
    merge_adapters(model)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_inputs_made_to_require_gradients():
    model = apply_lora(llama(), LoRAConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    model.enable_input_require_grads()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_compiled_model_switches(tmp_path):
    wants = {
        "a": theirs(tmp_path / "a", llama(), 1, modules_to_save=["lm_head"]),
        "b": theirs(tmp_path / "b", llama(), 2, modules_to_save=["lm_head"], bias="all"),
    }
    torch._dynamo.reset()
    model = torch.compile(llama(), backend="aot_eager")
    for name in wants:
        load_adapter(model, tmp_path / name, name)
    for name in ("a", "b", "a"):
        set_adapter(model, name)
        close(logits(model), wants[name])
    with disable_adapters(model):
        close(logits(model), logits(llama()))


def test_a_reference_pass_within_a_step():
    """As preference losses do it: the same model with its adapters off, before the backward pass."""
    model = apply_lora(llama(), LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    y = model(input_ids=IDS).logits
    with torch.no_grad(), disable_adapters(model):
        reference = model(input_ids=IDS).logits
    close(reference, logits(llama()))
    (y - reference - 1).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_was_untied_stays_so_in_a_merged_checkpoint(tmp_path):
    want = theirs(tmp_path / "adapter", llama(True), modules_to_save=["lm_head", "embed_tokens"])
    model = remove_lora(load_adapter(llama(True), tmp_path / "adapter"), merge=True)
    close(logits(model), want)
    model.save_pretrained(tmp_path / "whole")
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "whole").eval()), want)
