"""A tiny Llama, a batch of tokens, and a tokenizer, for the examples beside this."""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def llama() -> LlamaForCausalLM:
    """Two layers, 32 wide, with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32))


def tokens() -> torch.Tensor:
    """Four sequences that count."""
    return (torch.arange(4)[:, None] * 7 + torch.arange(16)) % 64


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter; 0 pads, 1 begins and 2 ends."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    letters = [*special.values(), *string.digits, *string.ascii_lowercase, *" +-*=.,:;?!()'/&%$#@^~|"]
    made = Tokenizer(models.WordLevel({letter: at for at, letter in enumerate(letters)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)
