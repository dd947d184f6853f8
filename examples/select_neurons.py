"""NeFT: a short training of the whole model says which neurons it turns; those train."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.stats import select_neurons


def train(model, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
    return loss.item()


turned = llama()
train(turned, 3)
chosen = select_neurons(llama().state_dict(), turned.state_dict(), fraction=0.05)
names = [name for kind in chosen.values() for name in kind]
model = apply_lora(llama(), LoRAConfig(method="neft", target_modules=names, method_options=chosen))
print(f"loss {train(model, 10):.3f}, {sum(p.numel() for p in model.parameters() if p.requires_grad)} numbers")
