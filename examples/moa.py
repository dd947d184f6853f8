"""Mixture-of-LoRAs: two adapters become experts, and routers learn whose domain a sequence is."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import fill_experts, set_adapter, side_inputs
from lora_kernels.routing import domain_loss, majority

model, where = llama(), {"target_modules": ["q_proj", "v_proj"]}
for name in ("law", "medicine"):  # each trained by itself
    apply_lora(model, LoRAConfig(r=2, **where), name)
apply_lora(model, LoRAConfig(r=2, method="moa", method_options={"experts": 2}, **where), "mixture")
fill_experts(model, ["law", "medicine"], "mixture")
set_adapter(model, "mixture")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids, domain = tokens(), torch.tensor([0, 1, 0, 1])
for _ in range(20):
    optimizer.zero_grad()
    with side_inputs(model, domain=domain) as call:
        loss = model(input_ids=ids, labels=ids).loss
    (loss + 0.1 * domain_loss(call, domain)).backward()
    optimizer.step()
print(f"loss {loss.item():.3f}, domains by the layers' votes {majority(call).tolist()}")
