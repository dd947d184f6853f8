"""LoRA-Composer: two concepts in two boxes, beside both adapters merged into the whole image."""

from __future__ import annotations

import torch

from lora_kernels import LoRAConfig
from lora_kernels.compose import RegionLoRA
from lora_kernels.nn import LoRALinear

CLAIM = "in its box each concept is its adapter's alone, outside all is the base; merged, neither is"
BOXES, SIZE = [(0, 0, 4, 8), (4, 0, 7, 8)], (8, 8)


def run(seed: int) -> dict[str, float]:
    """Mean distance to the adapter by itself in its box, and to the base outside: composed, and merged."""
    torch.manual_seed(seed)
    layers = [_layer(cols) for cols in (16, 12, 12, 16)]
    pixels, prompts = torch.randn(64, 16), torch.randn(3, 5, 12)
    whole = [(0, 0, 8, 8)]
    with torch.no_grad():
        alone = [
            RegionLoRA(*layers, adapters=[name])(pixels, prompts[[0, i + 1]], whole, SIZE)
            for i, name in enumerate("ab")
        ]
        base = RegionLoRA(*layers, adapters=[])(pixels, prompts[:1], [], SIZE)
        composed = RegionLoRA(*layers, adapters="ab")(pixels, prompts, BOXES, SIZE)
    want = torch.cat([alone[0][:32], alone[1][32:56], base[56:]])
    merged = alone[0] + alone[1] - base
    return {"composed": float((composed - want).norm()), "merged": float((merged - want).norm())}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["composed"] < 1e-4 < one["merged"] for one in figures)


def _layer(cols):
    layer = LoRALinear(cols, 16, r=4, adapter_name="a", init_lora_weights=False)
    layer.add_adapter("b", LoRAConfig(r=4, init_lora_weights=False))
    return layer
