"""RoseLoRA: a twentieth of A and B stays, and so few numbers of W change."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import RoseLoRA

model = apply_lora(llama(), LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
schedule = RoseLoRA(model, density=0.05, t_i=5, t_f=20)
for _ in range(25):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    schedule.step()
changed = [(pair.lora_b @ pair.lora_a).ne(0).float().mean().item() for pair in lora_pairs(model)]
print(f"loss {loss.item():.3f}, {max(changed):.1%} of a weight changed at most")
