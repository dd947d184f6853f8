"""FLoRA: a change of a convolution that is small in every dimension, with fewer numbers than LoRA's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lora_kernels.nn import LoRAConv2d

from ._planted import left

CLAIM = "a Tucker change of a convolution is learnt to 5 % with less than half of LoRA's numbers"
CHANNELS, KERNEL, RANKS = 12, 3, (3, 3, 2, 2)


def run(seed: int) -> dict[str, float]:
    """What is left of the change, and the trained numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, CHANNELS, 7, 7, generator=generator)
    change = torch.randn(RANKS, generator=generator)
    for k, (size, rank) in enumerate(zip((CHANNELS, CHANNELS, KERNEL, KERNEL), RANKS, strict=True)):
        factor, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator))
        change = torch.tensordot(factor, change, dims=([1], [k])).movedim(0, k)
    found = {}
    options = {"flora_core": {"method_options": {"ranks": list(RANKS)}}, "lora": {}}
    for method, more in options.items():
        layer = LoRAConv2d(CHANNELS, CHANNELS, KERNEL, r=3, lora_alpha=3, method=method, **more)
        want = F.conv2d(x, layer.weight.detach() + change.transpose(0, 1), layer.bias)
        found[method] = left(layer, x, want, 300, 5e-2)
        found[f"numbers, {method}"] = float(sum(p.numel() for p in layer.parameters() if p.requires_grad))
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """For each seed."""
    return all(
        one["flora_core"] < 0.05 and one["numbers, flora_core"] < one["numbers, lora"] / 2 for one in figures
    )
