"""GaLore: the base weights train through rank 4; their gradients are never in memory all at once."""

from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import remove_lora
from lora_kernels.optim import GaLoreAdamW

model = apply_lora(llama(), LoRAConfig(r=4, target_modules="all-linear"))
optimizer = GaLoreAdamW(model, lr=1e-2, update_proj_gap=10, scale=1.0)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
remove_lora(model)  # a plain Llama again, with the weights trained
print(f"loss {loss.item():.3f}")
