"""LoRASC: cycles of fast adapters on a noisy base; half of each stays in W."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import LoRASC

model = apply_lora(llama(), LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
schedule = LoRASC(model, optimizer, every=10, alpha=0.5, noise=0.1)
for _ in range(30):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    schedule.step()
schedule.finish()  # the noise is out of W
print(f"loss {loss.item():.3f} after {schedule.cycles} cycles")
