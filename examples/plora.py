"""PeriodicLoRA on a PEFT model: unloaded into W every 10 steps."""

import torch
from peft import LoraConfig, get_peft_model
from tiny import llama, tokens

from lora_kernels import accelerate
from lora_kernels.schedules import PeriodicLoRA

model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
accelerate(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
schedule = PeriodicLoRA(model, optimizer, every=10)
for _ in range(30):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    schedule.step()
print(f"loss {loss.item():.3f} after {schedule.steps // schedule.every} stages")
