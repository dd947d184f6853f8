"""SiRA: two of eight experts a token, of limited capacity, saved and loaded like any adapter."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter
from lora_kernels.nn import side_inputs
from lora_kernels.routing import balance_loss

options = {"method": "sira", "method_options": {"experts": 8, "top_k": 2, "capacity": 1.25}}
model = apply_lora(llama(), LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(20):
    optimizer.zero_grad()
    with side_inputs(model) as call:
        loss = model(input_ids=tokens(), labels=tokens()).loss
    (loss + 1e-2 * balance_loss(call)).backward()
    optimizer.step()
save_adapter(model, "sira")
again = load_adapter(llama(), "sira").eval()(input_ids=tokens(), labels=tokens()).loss
print(f"loss {loss.item():.3f}, read from its file and without dropout {again.item():.3f}")
