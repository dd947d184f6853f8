"""LoRA learns less and forgets less: both losses before and after, and the rank of what changed."""

import torch
from tiny import llama, tokens

from lora_kernels import apply_lora
from lora_kernels.analysis import biderman2024, effective_ranks, learning_forgetting

source, target = tokens(), tokens().flip(1)


def train(model, ids, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return [model(input_ids=one, labels=one).loss.item() for one in (target, source)]


model = llama()
before = train(model, source, 20)
model = apply_lora(model, biderman2024(4, exclude_modules=["lm_head"]))
after = train(model, target, 20)
print(learning_forgetting(*zip(before, after, strict=True)), set(effective_ranks(model).values()))
