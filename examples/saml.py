"""SAML: a router of utterances averages the factors of experts; router and experts train by turns."""

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import side_inputs
from lora_kernels.routing import UtteranceRouter, train_by_turns

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
options = {"method": "saml", "method_options": {"experts": 4}}
apply_lora(model, LoRAConfig(r=2, target_modules="all-linear", **options))
router = UtteranceRouter(16, experts=4)
optimizer = torch.optim.Adam([*router.parameters(), *model.parameters()], lr=1e-2)
x, target = torch.randn(6, 20, 16), torch.randn(6, 20, 8)
for step in range(40):
    train_by_turns(step, router, model)
    optimizer.zero_grad()
    with side_inputs(model, expert_weights=router(x)):
        loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")
