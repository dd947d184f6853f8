"""LoRAP: attention of low rank and fewer neurons, then LoRA beside what is left, in the same products."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compress import factorise, lorap
from lora_kernels.nn import remove_lora

model = llama()
batches, size = [{"input_ids": tokens(), "labels": tokens()}], sum(p.numel() for p in model.parameters())
kept = lorap(model, batches, sparsity=0.5, dense=True)
apply_lora(model, LoRAConfig(r=1, target_modules=list(kept.ranks)))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(10):
    optimizer.zero_grad()
    loss = model(**batches[0]).loss
    loss.backward()
    optimizer.step()
remove_lora(model, merge=True)
factorise(model, {name: rank + 1 for name, rank in kept.ranks.items()})
left = sum(p.numel() for p in model.parameters())
print(f"loss {loss.item():.3f}, {left / size:.0%} of the numbers; ranks {sorted(set(kept.ranks.values()))}")
