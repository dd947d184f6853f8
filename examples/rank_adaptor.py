"""RankAdaptor: which rank each projection gets, within the budget of rank 4 everywhere."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import Profile, search_ranks

names = [f"layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
profiles = [Profile(name, 32, 32, (2, 4, 8)) for name in names]


def score(ranks):
    model = apply_lora(llama(), LoRAConfig(target_modules=names, rank_pattern=ranks))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
    return -loss.item()


print(search_ranks(profiles, 4 * 4 * 64, score, init=3, rounds=2, candidates=8))
