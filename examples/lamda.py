"""LaMDA: A is frozen from the start, B column by column in 30 % of the steps; r² numbers a layer go on."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import count_parameters
from lora_kernels.schedules import LaMDAFreezer

model = apply_lora(llama(), LoRAConfig(r=4, method="lamda", target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
freezer = LaMDAFreezer(model, max_steps=20)
print(f"{count_parameters(model)[0]} numbers train")
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    freezer.step()
print(f"loss {loss.item():.3f}, {count_parameters(model)[0]} numbers train")
