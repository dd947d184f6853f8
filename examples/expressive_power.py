"""Expressive power: on single tokens, LoRA of rank 16 makes a frozen Llama another one of width 32."""

import torch
from tiny import llama

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.init import expressive_adapters, expressive_rank

target, words = llama(), torch.arange(64)[:, None]  # attention to one token is o_proj · v_proj
for layer in target.model.layers:
    torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.1)
    torch.nn.init.normal_(layer.self_attn.v_proj.weight, std=0.1)
for rank in (4, 8, expressive_rank(32, 2)):
    model, changes = llama(), {}
    for i, (layer, other) in enumerate(zip(model.model.layers, target.model.layers, strict=True)):
        frozen = [layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight]
        product = other.self_attn.o_proj.weight @ other.self_attn.v_proj.weight
        for name, (a, b) in zip("vo", expressive_adapters(frozen, product, rank), strict=True):
            changes[f"model.layers.{i}.self_attn.{name}_proj"] = {"expressive": b @ a}
    config = LoRAConfig(r=rank, lora_alpha=rank, init_lora_weights="expressive", target_modules=[*changes])
    apply_lora(model, config, statistics=changes)
    distance = (model(words).logits - target(words).logits).norm().item()
    print(f"rank {rank}: distance to the target {distance:.1e}")
