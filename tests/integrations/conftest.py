import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


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
def tokens():
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
