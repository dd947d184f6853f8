"""LAMPAT: the adapters learn under small adversarial changes of the embeddings."""

import torch
import torch.nn.functional as F
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import adversarial_step

model = apply_lora(llama(), LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
embeddings = model.get_input_embeddings()(tokens()).detach()
for _ in range(10):
    optimizer.zero_grad()
    loss = adversarial_step(
        lambda e: model(inputs_embeds=e).logits,
        embeddings,
        lambda logits: F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens()[:, 1:]),
        lr=1e-2,
        radius=1e-2,
    )
    optimizer.step()
print(f"loss {loss:.3f}")
