"""InfLoRA: two tasks, one after the other; the second leaves what the first reads alone."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import InfLoRA

config = LoRAConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0])
model = apply_lora(llama(), config)  # what the first layer reads stays the same in training
schedule = InfLoRA(model, tasks=2, share=1.0)
tasks = [tokens() % 16 + 16 * n for n in range(2)]  # words of their own
before = None
for task in tasks:
    schedule.begin_task(model, [task])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(task, labels=task).loss.backward()
        optimizer.step()
    schedule.end_task(model, [task])
    with torch.no_grad():
        logits = model(tasks[0]).logits
    before = logits if before is None else before
print(f"logits of the first task moved by {(logits - before).abs().max().item():.0e}")
