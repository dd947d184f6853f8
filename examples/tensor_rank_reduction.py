"""Rank reduction: a small network trains beside its decomposition and then becomes it."""

import torch
from torch import nn

from lora_kernels.schedules import RankReducer

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64))
model.extend([nn.ReLU(), nn.Linear(64, 4)])
images, labels = torch.randn(64, 3, 6, 6), torch.arange(64) % 4
before = sum(p.numel() for p in model.parameters())
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
reducer = RankReducer(model, every=10, lam=1e-2, eps=0.1, exclude=("5",))
for _ in range(40):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels) + reducer.penalty()
    loss.backward()
    optimizer.step()
    reducer.step()
small = reducer.export()
after = sum(p.numel() for p in small.parameters())
loss = nn.functional.cross_entropy(small(images), labels)
print(f"loss {loss.item():.3f} with {after / before:.0%} of the numbers, ranks {reducer.ranks}")
