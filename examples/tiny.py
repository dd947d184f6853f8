"""A tiny Llama and a batch of tokens, for the examples beside this."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama() -> LlamaForCausalLM:
    """Two layers, 32 wide, with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32))


def tokens() -> torch.Tensor:
    """Four sequences that count."""
    return (torch.arange(4)[:, None] * 7 + torch.arange(16)) % 64
