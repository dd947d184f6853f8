"""Riemannian preconditioning: each factor's gradient in the metric of the other, then AdamW."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.optim import riemannian

model = apply_lora(llama(), LoRAConfig(r=4, target_modules="all-linear"))
optimizer = riemannian(model, torch.optim.AdamW, lr=5e-3, reg=1e-2)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")
