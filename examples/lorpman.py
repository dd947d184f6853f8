"""LORPMAN: one model for every trade-off between two tasks, chosen by a preference at run time."""

import torch
from tiny import llama, tokens
from torch.nn.functional import cross_entropy

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compose import draw_preference, orthogonal_penalty
from lora_kernels.nn import side_inputs

model = apply_lora(llama(), LoRAConfig(r=8, target_modules=["up_proj", "lm_head"], method="lorpman"))
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
up, down = (tokens() + 1) % 64, (tokens() - 1) % 64  # to count up, or down
for _ in range(60):
    p = draw_preference(2)
    with side_inputs(model, preference=p):
        logits = model(tokens()).logits.transpose(1, 2)
    loss = p[0] * cross_entropy(logits, up) + p[1] * cross_entropy(logits, down)
    optimizer.zero_grad()
    (loss + orthogonal_penalty(model)).backward()
    optimizer.step()
for p in ([1.0, 0.0], [0.5, 0.5], [0.0, 1.0]):
    with side_inputs(model, preference=torch.tensor(p)):
        logits = model(tokens()).logits.transpose(1, 2)
    print(p, f"up {cross_entropy(logits, up).item():.2f}, down {cross_entropy(logits, down).item():.2f}")
