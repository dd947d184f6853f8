"""QLoRA: the base in 4 bits, the adapters on top, one fused call that reads the packed weight."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora, quantize_base, save_adapter

model = quantize_base(llama(), "nf4", target_modules="all-linear", double_quant=True)
apply_lora(model, LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
save_adapter(model, "adapter")  # for the dense base too
print(f"loss {loss.item():.3f} over {type(model.model.layers[0].self_attn.q_proj).__name__}")
