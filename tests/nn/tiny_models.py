"""Tiny models of Transformers' families, made from their configurations by the names of the sizes."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

# What a size is set to wherever a configuration has it by that name.
SIZES: dict[int, str] = {
    1: "n_group topk_group num_groups n_groups mamba_n_groups first_k_dense_replace num_nextn_predict_layers",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"
    " num_encoder_layers num_key_value_heads num_experts_per_tok top_k num_experts_per_token moe_topk"
    " moe_top_k depth num_hidden_groups num_blocks attention_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
    " num_local_experts num_experts n_routed_experts moe_num_experts num_codebooks mamba_n_heads"
    " mamba_num_heads linear_num_key_heads linear_num_value_heads",
    8: "head_dim attention_head_size kv_channels q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim"
    " v_head_dim d_kv state_size patch_size rope_head_dim index_head_dim linear_key_head_dim"
    " linear_value_head_dim time_step_rank mamba_d_state ssm_state_size mamba_dt_rank num_mel_bins"
    " num_queries num_buckets",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"
    " mamba_d_head mamba_head_dim global_head_dim",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size hidden_dim image_size word_embed_proj_dim"
    " projection_dim encoder_hidden_size decoder_hidden_size encoder_embed_dim decoder_embed_dim"
    " lru_width hidden_size_per_layer_input cross_attention_hidden_size conv_dim_size backbone_hidden_size",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size mlp_dim"
    " feed_forward_size dim_feedforward mamba_d_ssm max_position_embeddings n_positions max_source_positions"
    " max_target_positions vision_intermediate_size block_ff_dim",
    96: "vocab_size text_vocab_size vocab_size_per_layer_input entity_vocab_size audio_vocab_size"
    " src_vocab_size",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
LARGEST, SECONDS = 12_000_000, 6


class TooSlow(Exception):
    """More than a family's share of time."""


@contextlib.contextmanager
def limit(seconds: int):
    def stop(*args):
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tiny_config(kind: Any, given: dict[str, Any] | None = None) -> Any:
    """A configuration with small sizes, those inside it as well."""
    default = kind(**(given or {}))
    options = dict(given or {})
    for name, value in default.to_dict().items():
        own = getattr(default, name, None)
        if isinstance(own, PreTrainedConfig):
            options[name] = tiny_config(type(own), {}).to_dict()
        elif name in SIZE_OF and isinstance(own, int) and not isinstance(own, bool):
            options[name] = min(own, SIZE_OF[name]) if own > 0 else own
        elif name.endswith("token_id") and isinstance(value, int) and value >= 90:
            options[name] = 90 + value % 5
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        options.pop(name, None)
    return kind(**options)


def families() -> list[str]:
    """The families of which there is a plain model; by name, as importing all of them takes seconds."""
    return sorted({*CONFIG_MAPPING_NAMES} & {*MODEL_MAPPING_NAMES})


def tiny_model(family: str) -> Any:
    """The model, in evaluation mode.

    Raises:
        Exception: of any type, where the family cannot be made so.
    """
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[family])
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    if size > LARGEST:
        raise TooSlow(f"{size:,} parameters")
    return AutoModel.from_config(config).eval()


def inputs_of(model: Any) -> list[dict[str, Any]]:
    """What the model might take, one after the other."""
    tokens = torch.arange(2 * 8).view(2, 8) % 80 + 3
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    size = getattr(model.config, "image_size", None)
    size = size if isinstance(size, int) else 32
    image = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size).sin()}
    wave = {"input_values": torch.linspace(-9, 9, 2 * 4000).view(2, 4000).sin()}
    mel = {"input_features": torch.linspace(-3, 3, 2 * 8 * 128).view(2, 8, 128).sin()}
    both = {**text, "decoder_input_ids": tokens}
    first = str(getattr(model, "main_input_name", "input_ids"))
    kinds = [text, {"input_ids": tokens}, both, image, {**text, **image}, wave, mel]
    kinds += [{**mel, "decoder_input_ids": tokens}, {**wave, "decoder_input_ids": tokens}]
    return sorted(kinds, key=lambda one: first not in one)
