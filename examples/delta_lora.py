"""Delta-LoRA: from step 5 on W follows the adapters; W itself is not touched."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import DeltaLoRA

config = LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], method="delta_lora")
model = apply_lora(llama(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
schedule = DeltaLoRA(model, lam=2.0, start_step=5)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    schedule.step()
plain = model.model.layers[0].self_attn.q_proj.adapters["default"].to_lora()
print(f"loss {loss.item():.3f}; as a plain LoRA it has rank {plain.r}")
