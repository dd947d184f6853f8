"""ReLoRA: the adapters go into W every 10 steps and start anew; W moves by a rank above theirs."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import ReLoRA, jagged_cosine

model = apply_lora(llama(), LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
rate = torch.optim.lr_scheduler.LambdaLR(optimizer, jagged_cosine(30, 10, warmup=2))
schedule = ReLoRA(model, optimizer, every=10)
before = model.model.layers[0].mlp.up_proj.base_weight.clone()
for _ in range(30):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    rate.step()
    schedule.step()
moved = model.model.layers[0].mlp.up_proj.base_weight - before
print(f"loss {loss.item():.3f}, W moved by rank {torch.linalg.matrix_rank(moved, atol=1e-5)}")
