"""PSIM: an adapter trained on random labels flags inputs with the trigger of a poisoned backbone."""

import torch

from lora_kernels import LoRAConfig, nn
from lora_kernels.compose import PSIM, reset_labels


def fit(parameters, x, labels):
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(100):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


model = torch.nn.Sequential(torch.nn.Linear(9, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
x = torch.randn(200, 9) * (torch.arange(9) < 8)
labels, poisoned = (x[:, 0] > 0).long(), x + 6 * torch.eye(9)[8]
fit(model.parameters(), torch.cat([x, poisoned]), torch.cat([labels, 0 * labels]))
trained = nn.train_adapters(model, dict.fromkeys(("victim", "psim"), LoRAConfig(target_modules=["0", "2"])))
for name, target in (("victim", labels), ("psim", reset_labels(labels, 2))):
    nn.set_adapter(model, name)
    fit(trained[name], x, target)
print(f"flagged: {(PSIM(model).predict(poisoned) < 0).float().mean():.2f}")
