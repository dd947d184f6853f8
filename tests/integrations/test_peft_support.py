"""Every tuner of PEFT under accelerate(): each layer is fused or has its reason, and the page says so."""

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftMixedModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_kernels.integrations.peft import TAKEOVERS, accelerate, decelerate
from lora_kernels.integrations.support import BEGIN, END, layers_of, page, table, tuners
from lora_kernels.integrations.tuners.left import LEFT, QUANTIZED, why_class_left

ROOT = Path(__file__).parents[2]
# What those want whose own sizes do not fit a linear of 8 by 8.
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 9},
    "GRALORA": {"r": 4},
    "IA3": {"feedforward_modules": ["second"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.5},
    "TRAINABLE_TOKENS": {"target_modules": ["tokens"], "token_indices": [1]},
    "UNILORA": {"theta_d_length": 9},
    "VBLORA": {"num_vectors": 6, "vector_length": 4},
    "WAVEFT": {"n_frequency": 9},
}
# They want a language model, prompts or checkpoints; BOFT builds an extension.
OTHERS = {
    "BOFT",
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"),
    *("PROMPT_TUNING", "SHADOW", "XLORA"),
}


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"model_type": "none", "tie_word_embeddings": False}
        self.tokens = nn.Embedding(5, 8)
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids):
        return self.second(torch.tanh(self.first(self.norm(self.tokens(ids)))))


def tuner_names():
    names = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - OTHERS)
    # ADAMSS imports scikit-learn, for seconds.
    return [pytest.param(name, marks=pytest.mark.exhaustive if name == "ADAMSS" else ()) for name in names]


def wrapped(name):
    options = {"target_modules": ["first", "second"]} | OPTIONS.get(name, {})
    torch.manual_seed(0)
    return get_peft_model(Tiny(), PEFT_TYPE_TO_CONFIG_MAPPING[name](**options))


@pytest.mark.parametrize("name", tuner_names())
def test_every_layer_is_fused_or_has_its_reason(name):
    model = wrapped(name).eval()
    layers = {at: layer for at, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    classes = {at: type(layer) for at, layer in layers.items()}
    report = accelerate(model)
    reasons = dict(report.skipped)
    assert layers and {*report.accelerated, *reasons} == set(layers)
    assert not set(report.accelerated) & set(reasons)
    for at, layer in layers.items():
        fused = classes[at] in TAKEOVERS and type(layer) is TAKEOVERS[classes[at]].fused
        assert fused == (at in report.accelerated), reasons.get(at)
        if at in reasons and classes[at] not in TAKEOVERS:
            assert reasons[at] == why_class_left(classes[at])
    for at in reasons:
        assert f"{at}: {reasons[at]}" in str(report)
    decelerate(model)
    assert {at: type(layer) for at, layer in layers.items()} == classes


def test_a_mixed_models_layers_say_what_they_wrap():
    lora = peft.LoraConfig(target_modules=["first", "second"])
    model = PeftMixedModel(Tiny(), lora)
    model.add_adapter("loha", peft.LoHaConfig(target_modules=["first"]))
    report = accelerate(model)
    reasons = dict(report.skipped)
    assert reasons["base_model.model.first"] == "it wraps another tuner's layer"
    assert "base_model.model.second" in report.accelerated


def test_layers_over_quantised_bases_say_whose():
    class Linear4bit:
        __module__ = "peft.tuners.ia3.bnb"

    assert (
        why_class_left(Linear4bit)
        == "its base layer is one of bitsandbytes, which no fused form of ia3 reads"
    )
    assert {"bnb", "gptq", "awq"} < set(QUANTIZED)


def test_no_reason_is_of_nobody():
    """A line of LEFT is of a tuner with a layer that nothing takes over."""
    for tuner in LEFT:
        assert any(kind not in TAKEOVERS for kind in layers_of(tuner)), tuner


def test_the_page_is_what_accelerate_knows():
    assert {kind.__module__.split(".")[2] for kind in TAKEOVERS} <= set(tuners())
    text = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    if f"PEFT {peft.__version__}." not in text:
        pytest.skip("made for another version of PEFT")
    assert text == page(), "run lora-kernels peft --write"
    assert f"{BEGIN}{table()}{END}" in (ROOT / "README.md").read_text(encoding="utf-8")
