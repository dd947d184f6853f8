"""AutoLoRA: search each layer's rank on validation samples, then train a LoRA of those ranks."""

import itertools

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import AutoLoRA

targets = ["q_proj", "v_proj"]
options = {"values": "softmax"}
model = apply_lora(llama(), LoRAConfig(r=8, target_modules=targets, method="bilora", method_options=options))
halves = [itertools.repeat(half) for half in tokens().chunk(2)]
search = AutoLoRA(model, lambda batch: model(input_ids=batch, labels=batch).loss, *halves, lr=1e-1)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(20):
    optimizer.zero_grad()
    batch = next(halves[0])
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    search.step()
found = apply_lora(llama(), LoRAConfig(target_modules=targets, rank_pattern=search.rank_pattern()))
print(search.ranks(), sum(p.numel() for p in found.parameters() if p.requires_grad), "numbers to train")
