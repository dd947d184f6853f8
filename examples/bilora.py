"""BiLoRA: A and B learn from one half of the data, the values between them from the other."""

import itertools

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import BiLoRA, orthogonality

config = LoRAConfig(
    r=4, target_modules=["q_proj", "v_proj"], method="bilora", method_options={"values": "softmax"}
)
model = apply_lora(llama(), config)
halves = [itertools.repeat(half) for half in tokens().chunk(2)]
schedule = BiLoRA(model, lambda batch: model(input_ids=batch, labels=batch).loss, *halves)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for _ in range(20):
    optimizer.zero_grad()
    batch = next(halves[0])
    loss = model(input_ids=batch, labels=batch).loss
    (loss + 0.01 * orthogonality(model)).backward()
    optimizer.step()
    schedule.step()
print(f"loss {loss.item():.3f}")
