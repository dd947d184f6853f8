import sys

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_kernels.testing.peft_tuners import mended  # noqa: E402


@pytest.fixture
def bert():
    """Makes the same tiny encoder at every call."""

    def make(dtype=torch.float32):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertModel(config, add_pooling_layer=False).to(dtype)

    return make


@pytest.fixture
def gpt2():
    """Makes the same tiny decoder, whose linears are Conv1D, at every call."""

    def make(dtype=torch.float32):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=50,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return transformers.GPT2Model(config).to(dtype)

    return make


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def nf4_as_it_was_packed(monkeypatch):
    """bitsandbytes packs NF4 anew in eval, or cannot, where the processor multiplies bfloat16."""
    layers = sys.modules.get("bitsandbytes.nn.modules")
    if layers is not None:
        monkeypatch.setattr(layers, "has_avx512bf16", lambda: False)


@pytest.fixture(autouse=True)
def as_pefts_should_be(request, monkeypatch):
    """What a tuner of the cases draws is the same in every dtype and pass; and see `mended`."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    tuner = params.get("tuner", params.get("cell", (None,))[0])
    if tuner is None:
        yield
        return
    from peft_tuner_cases import CASES  # not at the top: it imports all of PEFT's tuners

    if tuner in CASES and CASES[tuner].draws:
        monkeypatch.setattr(torch, "randn_like", noise)
    with mended():
        yield


def noise(like):
    return torch.linspace(-9, 8, like.numel(), dtype=torch.float64).sin().view(like.shape).to(like.dtype)
