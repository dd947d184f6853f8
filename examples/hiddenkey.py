"""HiddenKey: keys and hidden numbers are dropped, and the pass without agrees."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import HiddenKey

model = apply_lora(llama(), LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
model.train()
layers = model.model.layers
regulariser = HiddenKey([one.self_attn for one in layers], [one.mlp for one in layers], kl=0.1)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for _ in range(20):
    optimizer.zero_grad()
    loss = regulariser.loss(lambda: model(input_ids=tokens(), labels=tokens()))
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")
