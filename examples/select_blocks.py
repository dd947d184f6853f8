"""SMT: the gradients of a warm-up say which blocks of which weights train."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora, calibrate
from lora_kernels.stats import select_blocks

samples = [{"input_ids": part, "labels": part} for part in tokens().chunk(4)]
gradients = calibrate(llama(), samples, "gradient", exclude_modules=["lm_head"])
blocks = select_blocks(gradients, count=6, block=16)
options = {"block": 16, "blocks": blocks}
model = apply_lora(llama(), LoRAConfig(method="smt", target_modules=[*blocks], method_options=options))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(10):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}, blocks of {', '.join(blocks)}")
