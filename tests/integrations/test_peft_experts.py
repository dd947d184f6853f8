"""accelerate() on PEFT's ``target_parameters``: experts' 3-D parameters."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.integrations.peft_experts import FusedParamWrapper
from lora_kernels.testing import assert_close

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")

COMMON = {"hidden_size": 16, "vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
COMMON |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
CONFIGS = {
    "Mixtral": {"intermediate_size": 12, "num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1},
    "GptOss": {"intermediate_size": 12, "num_local_experts": 4, "head_dim": 8},
    "DeepseekV3": {
        "moe_intermediate_size": 12,
        "intermediate_size": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
BOTH = ("gate_up_proj", "down_proj")


def wrapped(family, parameters=BOTH, way=None):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON, **CONFIGS[family])
    model = getattr(transformers, f"{family}Model")(config)
    if way is not None:
        model.set_experts_implementation(way)
    targets = [f"experts.{name}" for name in parameters]
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets))
    return shaken(model)


def shaken(model):
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return model.eval()


def run(model):
    tokens = torch.arange(14).view(2, 7) % 20
    embed = model.get_input_embeddings()(tokens).detach().requires_grad_()
    y = model(inputs_embeds=embed).last_hidden_state
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": embed.grad, **grads}


def assert_same_as_peft(model):
    theirs = copy.deepcopy(model)
    decelerate(theirs)
    eager, ours = run(theirs), run(model)
    theirs.base_model.model.set_experts_implementation("eager")  # torch's grouped_mm takes no float64
    exact = run(theirs.double())
    assert ours.keys() == eager.keys()
    for name in ours:
        assert_close(ours[name], eager[name], exact[name], name, ulps=16.0)


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


@pytest.mark.parametrize("family", CONFIGS)
def test_outputs_and_gradients_are_pefts(family, monkeypatch):
    model = wrapped(family)
    report = accelerate(model)
    assert len(report.accelerated) == 2 and not report.skipped
    with monkeypatch.context() as context:
        context.setattr(ParamWrapper, "_activate_lora", lambda *args: pytest.fail("W + ΔW was made"))
        run(model)
    assert_same_as_peft(model)


@pytest.mark.parametrize("parameters", [("down_proj",), ("gate_up_proj",)])
@pytest.mark.parametrize("way", ["eager", "batched_mm"])
def test_one_parameter_and_other_ways(parameters, way):
    model = wrapped("Mixtral", parameters, way)
    accelerate(model)
    assert_same_as_peft(model)


def test_a_trained_base_and_several_adapters():
    model = wrapped("Qwen3Moe")
    targets = [f"experts.{name}" for name in BOTH]
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=targets))
    shaken(model)
    model.base_model.set_adapter(["default", "b"])
    for parameter in model.parameters():
        parameter.requires_grad_()
    accelerate(model)
    assert_same_as_peft(model)


def test_the_api_goes_on_and_what_is_not_ours_goes_to_peft():
    model = wrapped("GptOss")
    plain = copy.deepcopy(model)
    accelerate(model)
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(run(model)["y"], run(plain)["y"])
    again = pickle.loads(pickle.dumps(model))
    assert all(type(one) is FusedParamWrapper for one in wrappers(again))
    model.merge_adapter()
    torch.testing.assert_close(run(model)["y"], run(plain)["y"])
    model.unmerge_adapter()
    calls = []
    wrappers(model)[0].get_base_layer().register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(run(model)["y"], run(plain)["y"])
    assert calls
    assert decelerate(model) == 2
    assert all(type(one) is ParamWrapper for one in wrappers(model))
    merged = again.merge_and_unload()
    assert not wrappers(merged)
    torch.testing.assert_close(run(merged)["y"], run(plain)["y"])


class Own(nn.Module):
    """A mixture that nobody knows."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        return x @ self.stack.sum(0)


def test_unknown_experts_stay_pefts():
    model = get_peft_model(nn.Sequential(Own()), LoraConfig(target_modules=[], target_parameters=["0.stack"]))
    report = accelerate(model)
    assert not report.accelerated
    assert "is not one of Transformers' expert modules" in report.skipped[0][1]
    assert type(wrappers(model)[0]) is ParamWrapper
