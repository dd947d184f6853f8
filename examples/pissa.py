"""PiSSA trains the principal part of W; saved, it is LoRA of twice the rank on the untouched W."""

import torch
from peft import PeftModel
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora, save_adapter

config = LoRAConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa")
model = apply_lora(llama(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
save_adapter(model, "pissa")
again = PeftModel.from_pretrained(llama(), "pissa")(input_ids=tokens(), labels=tokens()).loss
print(f"loss {loss.item():.3f}, and of PEFT on the untouched base {again.item():.3f}")
