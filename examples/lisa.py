"""LISA: all weights train, but of the blocks one at a time."""

import torch
from tiny import llama, tokens

from lora_kernels.schedules import LISA

model = llama()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = LISA(model, model.model.layers, n_active=1, interval=5)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    schedule.step()
print(f"loss {loss.item():.3f}; block {schedule.active[0]} trains now")
