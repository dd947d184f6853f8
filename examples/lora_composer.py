"""LoRA-Composer: two concepts' adapters, each in its box of one image, in one call a projection."""

import torch

from lora_kernels import LoRAConfig
from lora_kernels.compose import RegionLoRA, region_self_attn_mask
from lora_kernels.nn import LoRALinear


def layer(cols):
    one = LoRALinear(cols, 16, r=4, adapter_name="cat")
    one.add_adapter("hat", LoRAConfig(r=4, init_lora_weights=False))
    return one


attention = RegionLoRA(*(layer(cols) for cols in (16, 12, 12, 16)), adapters=["cat", "hat"], heads=2)
boxes, pixels, prompts = [(2, 0, 8, 5), (0, 3, 4, 8)], torch.randn(64, 16), torch.randn(3, 7, 12)
with torch.no_grad():
    image = attention(pixels, prompts, boxes, (8, 8))
mask = region_self_attn_mask(boxes, 8, 8)
print(f"{len(image)} pixels; {(mask < 0).float().mean():.0%} of self-attention is between concepts")
