"""Expressive power: LoRA of rank 4 makes four frozen layers with ReLUs one given linear layer."""

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.init import expressive_network, expressive_rank

torch.manual_seed(0)
width, depth, radius = 16, 4, 6.0
frozen = nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())][:-1])
target, x = nn.Linear(width, width), torch.randn(32, width)
before = (frozen.double()(x.double()) - target.double()(x.double())).norm().item()
layers = [part for part in frozen if isinstance(part, nn.Linear)]
names = [name for name, part in frozen.named_modules() if isinstance(part, nn.Linear)]
rank = expressive_rank(width, depth)
pieces = expressive_network(layers, [target], rank, radius)
for layer, piece in zip(layers, pieces, strict=True):
    layer.bias.data.copy_(piece.bias)
statistics = {name: {"expressive": piece.change} for name, piece in zip(names, pieces, strict=True)}
config = LoRAConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights="expressive")
apply_lora(frozen, config, statistics=statistics)
after = (frozen(x.double()) - target(x.double())).norm().item()
print(f"rank {rank}: distance to the target {before:.2f} before, {after:.1e} after")
