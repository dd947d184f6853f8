"""SoRA: gates on the ranks close under a threshold that grows; what stays open is a smaller LoRA."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import lora_layers
from lora_kernels.schedules import SoRASchedule

model = apply_lora(llama(), LoRAConfig(r=8, method="sora", target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
schedule = SoRASchedule(model, xis=(0.0, 2e-2, 8e-2), steps=(10, 10, 10))
for _ in range(30):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    schedule.step()
small = [layer.adapters["default"].compact().r for layer in lora_layers(model).values()]
print(f"loss {loss.item():.3f}, closed after each stage {schedule.sparsity}, ranks left {small}")
