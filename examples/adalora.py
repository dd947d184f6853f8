"""AdaLoRA: a budget of ranks goes where they matter; then the zeros are cut off."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import AdaLoRA, adalora_penalty, compact

targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
model = apply_lora(llama(), LoRAConfig(r=6, target_modules=targets, method="adalora"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
schedule = AdaLoRA(model, 30, target_r=2, tinit=5, tfinal=10)
for _ in range(30):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    (loss + 0.5 * adalora_penalty(model)).backward()
    optimizer.step()
    schedule.step()
print(f"loss {loss.item():.3f}, ranks {list(compact(model).values())}")
