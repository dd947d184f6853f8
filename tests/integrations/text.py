"""A tiny language model, its tokenizer and its texts, for trainers."""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = ("<pad>", "</s>", "<unk>")


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, **SIZES, max_position_embeddings=64, pad_token_id=0, eos_token_id=1)
    return LlamaForCausalLM(config)


def tokenizer():
    """Letter by letter."""
    letters = [*SPECIAL, *string.digits, *string.ascii_lowercase, *" +=."]
    words = models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<unk>")
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def sums():
    return [{"text": f"{i} + {i} = {2 * i}"} for i in range(8)]


def preferences():
    return [{"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{i}"} for i in range(8)]
