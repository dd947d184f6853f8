"""AutoLoRa: clean samples train the adapters, attacked ones the weights; then the adapters are left out."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import TwoBranches, autolora_lambdas, pgd, two_branch_loss

model = apply_lora(llama(), LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
branches = TwoBranches(model, head=[model.lm_head])
x, labels = model.get_input_embeddings()(tokens()).detach(), tokens()[:, 1:].flatten()
clean, robust = (
    lambda e, branch=branch: branch(inputs_embeds=e).logits[:, :-1].flatten(0, 1)
    for branch in (branches.natural, branches.adversarial)
)
optimizer, accuracy = torch.optim.AdamW(branches.parameters(), lr=5e-3), 0.0
for _ in range(15):
    attacked = pgd(robust, x, labels, radius=1e-2, step=5e-3, steps=3, bounds=(-1.0, 1.0))
    optimizer.zero_grad()
    natural = clean(x)
    two_branch_loss(natural, robust(attacked), labels, *autolora_lambdas(accuracy)).backward()
    optimizer.step()
    accuracy = (natural.argmax(-1) == labels).float().mean().item()
held = (robust(attacked).argmax(-1) == labels).float().mean().item()
print(f"accuracy {accuracy:.2f}, on attacked samples without the adapters {held:.2f}")
