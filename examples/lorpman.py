"""LORPMAN: one model for every trade-off between two tasks, chosen by a preference at run time."""

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compose import draw_preference, orthogonal_penalty
from lora_kernels.nn import side_inputs

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
x, tasks = torch.randn(64, 8), torch.randn(2, 64, 1)
apply_lora(model, LoRAConfig(r=4, target_modules=["0", "2"], method="lorpman"))
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(100):
    p = draw_preference(2)
    with side_inputs(model, preference=p):
        losses = (model(x) - tasks).square().mean((1, 2))
    optimizer.zero_grad()
    (p @ losses + orthogonal_penalty(model)).backward()
    optimizer.step()
for p in ([1.0, 0.0], [0.5, 0.5], [0.0, 1.0]):
    with torch.no_grad(), side_inputs(model, preference=torch.tensor(p)):
        print(p, [round(loss, 3) for loss in (model(x) - tasks).square().mean((1, 2)).tolist()])
