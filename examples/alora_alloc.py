"""ALoRA: ranks move to the layers where taking one away hurts most."""

from functools import partial

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import ALoRAAllocator, compact

options = {"method": "alora_alloc", "method_options": {"active": 2}}
model = apply_lora(llama(), LoRAConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], **options))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
score = partial(model, input_ids=tokens(), labels=tokens())
schedule = ALoRAAllocator(model, lambda: score().loss, optimizer, first=10, every=5, rounds=2)
for _ in range(20):
    optimizer.zero_grad()
    score().loss.backward()
    optimizer.step()
    schedule.step()
live = list(schedule.ranks.values())
print(f"loss {score().loss.item():.3f}, live ranks {live}, kept {list(compact(model).values())}")
