"""PRILoRA: ranks that rise with depth, and half of A zero by what it reads."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import PRILoRA, linear_ranks

base = llama()
pattern = {rf"layers\.{i}\..*": r for i, r in enumerate(linear_ranks(len(base.model.layers), 2, 6))}
model = apply_lora(base, LoRAConfig(target_modules=["q_proj", "v_proj"], rank_pattern=pattern))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
schedule = PRILoRA(model, every=5, ratio=0.5)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    schedule.step()
schedule.prune()
zeros = {pair.name: (pair.rank, pair.lora_a.eq(0).float().mean().item()) for pair in lora_pairs(model)}
print(f"loss {loss.item():.3f}", zeros)
