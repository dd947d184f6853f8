"""LoRA+: B learns 16 times faster than A."""

from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.optim import lora_plus

model = apply_lora(llama(), LoRAConfig(r=4, target_modules="all-linear"))
optimizer = lora_plus(model, lr=1e-3, ratio=16)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")
