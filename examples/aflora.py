"""AFLoRA: A and B freeze where their scores are least; the scales of ranks and outputs go on."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import count_parameters
from lora_kernels.schedules import AFLoRAFreezer

model = apply_lora(llama(), LoRAConfig(r=4, method="aflora", target_modules=["up_proj", "down_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
freezer = AFLoRAFreezer(model, total_steps=20, t_i=2, t_f=6, window=2)
print(f"{count_parameters(model)[0]} numbers train")
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    freezer.step()
print(f"loss {loss.item():.3f}, {count_parameters(model)[0]} numbers train")
