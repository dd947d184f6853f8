"""LoRAConfig(target_parameters=…) on Transformers' expert modules, against PEFT's."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter
from lora_kernels.nn import (
    delete_adapter,
    disable_adapters,
    lora_layers,
    merge_adapters,
    remove_lora,
    set_adapter,
    unmerge_adapters,
)
from lora_kernels.nn.lora_experts import LoRAExperts
from lora_kernels.optim import lora_plus_groups

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")

COMMON = {"hidden_size": 16, "vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
COMMON |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "intermediate_size": 12}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
OPTIONS = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": BOTH}


def base(family="Mixtral"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    model = getattr(transformers, f"{family}Model")(config).eval()
    for _, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def shaken(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def ours(family="Mixtral", **options):
    return shaken(apply_lora(base(family), LoRAConfig(**{**OPTIONS, **options})))


def output(model):
    return model(input_ids=torch.arange(14).view(2, 7) % 20).last_hidden_state


def experts(model):
    return next(layer for layer in lora_layers(model).values() if isinstance(layer, LoRAExperts))


def files(*folders):
    return [load_file(folder / "adapter_model.safetensors") for folder in folders]


@torch.no_grad()
def gradients_for_parameters(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.grad)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Mixtral", {"rank_pattern": {"experts.down_proj": 2}, "use_rslora": True}),
        ("Qwen3Moe", {"target_parameters": BOTH[1:], "target_modules": None}),
        ("GptOss", {"alpha_pattern": {"gate_up_proj": 2}, "target_modules": []}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_outputs_and_gradients_are_peft_s(family, options, tmp_path):
    options = {**OPTIONS, **options}
    theirs = shaken(get_peft_model(base(family), LoraConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(base(family), tmp_path / "theirs")
    expected = output(theirs)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(base(family)), expected, atol=1e-2)
    save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(*files(tmp_path / "ours", tmp_path / "theirs"), rtol=0, atol=0)
    back = PeftModel.from_pretrained(base(family), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), expected)
    for one in (theirs, model):
        output(one).square().sum().backward()
        gradients_for_parameters(one)
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(*files(tmp_path / "ours", tmp_path / "theirs"), rtol=1e-3, atol=1e-3)


def test_it_starts_as_peft_s_does():
    torch.manual_seed(3)
    model = apply_lora(base(), LoRAConfig(**OPTIONS))
    torch.testing.assert_close(output(model), output(base()))
    adapter = experts(model).adapters["default"]
    assert adapter.gate_up_proj_lora_A.shape == (12, 16) and adapter.down_proj_lora_B.shape == (16, 12)
    assert 0.2 < adapter.gate_up_proj_lora_A.abs().max() <= 0.25


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_merged_disabled_removed_and_pickled(family):
    plain = base(family)
    model = ours(family)
    active = output(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    merge_adapters(model)
    torch.testing.assert_close(output(model), active, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    with disable_adapters(model):
        torch.testing.assert_close(output(model), output(plain))
    unmerge_adapters(model)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(output(one), active)
    merge_adapters(model)
    removed = remove_lora(copy.deepcopy(model), merge=True)
    torch.testing.assert_close(output(removed), active, rtol=1e-4, atol=1e-5)
    removed = remove_lora(model)
    assert type(removed.layers[0].mlp.experts) is type(plain.layers[0].mlp.experts)
    torch.testing.assert_close(dict(removed.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_several_adapters_add_up():
    model = ours()
    one = output(model)
    apply_lora(model, LoRAConfig(**{**OPTIONS, "r": 2, "target_parameters": BOTH[:1]}), "b")
    assert torch.equal(output(model), one)
    set_adapter(model, ["default", "b"])
    shaken(model)
    both = output(model)
    merge_adapters(model)
    torch.testing.assert_close(output(model), both, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    set_adapter(model, "b")
    delete_adapter(model, "default")
    assert not torch.allclose(output(model), both)


def test_no_weight_of_all_experts_is_made(monkeypatch):
    model = ours()
    whole = experts(model).gate_up_proj.numel()
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            fresh = isinstance(y, torch.Tensor) and not y._is_view() and y.dim() == 3
            if fresh and y.shape[0] == 4 and y.numel() >= whole:
                made.append(function)
            return y

    with Watch():
        output(model).sum().backward()
    assert not made


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": "experts.down_proj"},
        {"target_parameters": [3]},
        {"target_parameters": BOTH, "lora_dropout": 0.1},
        {"target_parameters": BOTH, "use_dora": True},
        {"target_parameters": BOTH, "lora_bias": True},
        {"target_parameters": BOTH, "init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_a_bad_config_is_named(options):
    with pytest.raises((TypeError, ValueError), match="target_parameters"):
        LoRAConfig(target_modules=[], **options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["experts.nothing"], "no parameter of the model is named 'experts.nothing'"),
        (["q_proj.weight"], "no stack"),
        ([*BOTH, "experts.gate_up_proj_bias"], "no stack"),
    ],
)
def test_what_does_not_fit_changes_nothing(names, message):
    model = base("GptOss")
    with pytest.raises(ValueError, match=f"target_parameters.*{message}"):
        apply_lora(model, LoRAConfig(target_parameters=names))
    assert not lora_layers(model) and all(one.requires_grad for one in model.parameters())


def test_experts_run_in_another_way_are_refused_by_name():
    model = ours()
    model.set_experts_implementation("eager")
    output(model)
    model.config._experts_implementation = "other"
    with pytest.raises(ValueError, match=r"target_parameters.*'other'"):
        output(model)


def test_lora_plus_has_the_experts_b_among_the_fast_ones():
    model = ours()
    fast = {id(p) for group in lora_plus_groups(model, 1.0, 16) if group["lr"] == 16 for p in group["params"]}
    factors = dict(experts(model).adapters["default"].named_parameters())
    assert {name for name, one in factors.items() if id(one) in fast} == {n for n in factors if n[-1] == "B"}
