"""DyLoRA: another rank at each step, one for all layers; afterwards any rank serves."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import DyLoRASampler

model = apply_lora(llama(), LoRAConfig(r=4, method="dylora", target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
sampler = DyLoRASampler(model)
for _ in range(20):
    optimizer.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    sampler.step()
for rank in (1, 2, 4):
    sampler.finish(rank)
    with torch.no_grad():
        print(f"rank {rank}: loss {model(input_ids=tokens(), labels=tokens()).loss.item():.3f}")
