"""High-rank warm-up: ten steps at rank 16, then its best two ranks go on; and what homophones cost."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.analysis import nprr, word_error_rate
from lora_kernels.schedules import RankWarmup, compact

model = apply_lora(llama(), LoRAConfig(r=16, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
schedule = RankWarmup(model, optimizer, r_lo=2, steps=10)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    schedule.step()
print(f"loss {loss.item():.3f}, ranks {list(compact(model).values())}")
said = [sentence.split() for sentence in ("the sea is two miles away", "i can hear it from here")]
clean = [sentence.split() for sentence in ("the sea is two miles a way", "i can hear it from here")]
perturbed = [sentence.split() for sentence in ("the see is two miles a way", "i can here it from here")]
print(f"NPRR {nprr(word_error_rate(said, clean), word_error_rate(said, perturbed)):.2f}")
