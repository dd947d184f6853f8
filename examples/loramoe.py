"""LoRAMoE: experts on feed-forward layers, and a loss that keeps two kinds of samples apart."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import side_inputs
from lora_kernels.routing import localized_balance_loss

options = {"method": "loramoe", "method_options": {"experts": 4}}
model = apply_lora(llama(), LoRAConfig(r=2, target_modules=["up_proj", "down_proj"], **options))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
kinds = torch.tensor([0, 1, 0, 1])  # what each sequence teaches: the world, or a task
for _ in range(20):
    optimizer.zero_grad()
    with side_inputs(model) as call:
        loss = model(input_ids=tokens(), labels=tokens()).loss
    (loss + 0.1 * localized_balance_loss(call, kinds, delta=0.1)).backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")
