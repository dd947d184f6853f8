"""Rank reduction: a small model trains beside its decomposition and then becomes it."""

import torch
from tiny import llama, tokens

from lora_kernels.schedules import RankReducer

model = llama()
before = sum(p.numel() for p in model.parameters())
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
reducer = RankReducer(model, every=10, lam=1e-1, eps=0.2, exclude=("lm_head",))
for _ in range(40):
    optimizer.zero_grad()
    loss = model(tokens(), labels=tokens()).loss + reducer.penalty()
    loss.backward()
    optimizer.step()
    reducer.step()
small = reducer.export()
after = sum(p.numel() for p in small.parameters())
loss = small(tokens(), labels=tokens()).loss
print(f"loss {loss.item():.3f} with {after / before:.0%} of the numbers, ranks {[*reducer.ranks.values()]}")
