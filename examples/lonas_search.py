"""LoNAS: training on random sub-networks, then a search for those that lose least."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import elastic
from lora_kernels.schedules import Group, draw_sizes, search_subnetworks, slices_of

model = apply_lora(llama(), LoRAConfig(r=4, target_modules="all-linear", method="lonas"), fuse=False)
mlps = [f"model.layers.{i}.mlp" for i in (0, 1)]
widths = {"gate_proj": "out_features", "up_proj": "out_features", "down_proj": "in_features"}
groups = [Group(mlp, (48, 40, 32), tuple((f"{mlp}.{k}", v) for k, v in widths.items())) for mlp in mlps]
groups += [Group("rank", (4, 2), tuple((f"{mlp}.down_proj", "rank") for mlp in mlps))]
batch = {"input_ids": tokens(), "labels": tokens()}
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for _ in range(10):
    optimizer.zero_grad()
    with elastic(model, slices_of(groups, draw_sizes(groups))):
        model(**batch).loss.backward()
    optimizer.step()
front = search_subnetworks(model, groups, lambda: -model(**batch).loss.item(), evaluations=18)
for one in front:
    print(f"loss {-one.score:.3f} with {one.macs} multiplications: {list(one.sizes.values())}")
