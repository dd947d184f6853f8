"""AutoLoRa: clean samples train the adapters, attacked ones the weights; then the adapters are left out."""

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import TwoBranches, autolora_lambdas, pgd, two_branch_loss

torch.manual_seed(0)
x, labels = torch.rand(64, 8), torch.arange(64) % 2
x[labels == 1, :4] = 0.5 + 0.5 * x[labels == 1, :4]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
branches = TwoBranches(apply_lora(model, LoRAConfig(r=2, target_modules=["0"])), head=[model[2]])
optimizer = torch.optim.SGD(branches.parameters(), lr=0.1, momentum=0.9)
accuracy = 0.5
for _ in range(30):
    attacked = pgd(branches.adversarial, x, labels)
    optimizer.zero_grad()
    natural = branches.natural(x)
    loss = two_branch_loss(natural, branches.adversarial(attacked), labels, *autolora_lambdas(accuracy))
    loss.backward()
    optimizer.step()
    accuracy = (natural.argmax(-1) == labels).float().mean().item()
robust = (branches.adversarial(attacked).argmax(-1) == labels).float().mean().item()
print(f"accuracy {accuracy:.2f}, on attacked samples without the adapters {robust:.2f}")
