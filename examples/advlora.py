"""AdvLoRA: the adapters start from clusters of W and learn under attacks on the embeddings."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import advlora_loss

config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], method="advlora", init_lora_weights="clusters")
model = apply_lora(llama(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
embeddings = model.get_input_embeddings()(tokens()).detach()
for _ in range(10):
    optimizer.zero_grad()
    loss = advlora_loss(
        lambda e: model(inputs_embeds=e, labels=tokens()).loss,
        embeddings,
        radius=1e-2,
        step=5e-3,
        bounds=None,
    )
    loss.backward()
    optimizer.step()
adapter = model.model.layers[0].self_attn.q_proj.adapters["default"]
print(f"loss {loss.item():.3f}, scale {adapter.scale.item():.4f}")
