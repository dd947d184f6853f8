"""ExPLoRA: pre-training goes on with the last block whole and LoRA on the others, then it is merged."""

import torch
from tiny import llama, tokens

from lora_kernels.schedules import apply_explora, merge_and_restart

model = llama()
apply_explora(model, model.model.layers, unfreeze=[-1], r=4)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
merge_and_restart(model)
print(f"loss {loss.item():.3f}, {sum(p.numel() for p in trained)} numbers trained")
