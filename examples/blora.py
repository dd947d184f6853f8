"""Bayesian-LoRA: gates over bits and ranks learn beside the factors."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import BLoRA, bit_operations, blora_gate_loss

model = apply_lora(llama(), LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], method="blora"))
before = bit_operations(model)
gates = [p for name, p in model.named_parameters() if name.endswith(("bit_gates", "rank_gates"))]
factors = [p for p in model.parameters() if p.requires_grad and not any(p is gate for gate in gates)]
optimizer = torch.optim.AdamW([{"params": factors, "lr": 5e-3}, {"params": gates, "lr": 0.5}])
schedule = BLoRA(model, warmup=5)
for _ in range(25):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    (loss + 1e-2 * blora_gate_loss(model)).backward()
    optimizer.step()
    schedule.step()
print(f"loss {loss.item():.3f}, bit operations {bit_operations(model) / before:.0%} of all gates open")
