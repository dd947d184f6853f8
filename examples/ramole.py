"""RAMoLE: a small router weighs the retrieved adapters of each sequence, token by token."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import fill_experts, set_adapter, side_inputs

model, where = llama(), {"target_modules": ["q_proj", "v_proj"]}
for name in ("law", "medicine", "code"):
    apply_lora(model, LoRAConfig(r=2, init_lora_weights=False, **where), name)
options = {"method": "ramole", "method_options": {"experts": 3, "router_rank": 4, "candidate_dropout": 0.3}}
apply_lora(model, LoRAConfig(r=2, **options, **where), "mixture")
fill_experts(model, ["law", "medicine", "code"], "mixture")
set_adapter(model, "mixture")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
candidates = torch.tensor([[0, 1], [1, 2], [2, 0], [0, -1]])  # as an AdapterIndex finds them
for _ in range(20):
    optimizer.zero_grad()
    with side_inputs(model, candidates=candidates):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")
