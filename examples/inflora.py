"""InfLoRA: two tasks, one after the other; the second leaves what the first reads alone."""

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import InfLoRA

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 32))
apply_lora(model, LoRAConfig(r=4, target_modules=["0"]))
schedule = InfLoRA(model, tasks=2, share=1.0)
tasks = [torch.randn(8, 32) for _ in range(2)]  # eight directions each
outputs = None
for x in tasks:
    schedule.begin_task(model, [x])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    schedule.end_task(model, [x])
    outputs = model(tasks[0]).detach() if outputs is None else outputs
print(f"outputs of the first task moved by {(model(tasks[0]) - outputs).abs().max().item():.0e}")
