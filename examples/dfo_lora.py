"""LoRA without gradients: CMA-ES, whose population is one batch of many adapters."""

import torch.nn.functional as F
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.optim import DerivativeFree


def losses(batch):
    logits = model(input_ids=batch).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


model = apply_lora(llama(), LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
optimizer = DerivativeFree(model, dim=16, popsize=8)
for _ in range(3):
    loss = optimizer.step(losses, tokens())
print(f"loss {loss:.3f}")
