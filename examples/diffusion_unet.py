"""A UNet's block with an adapter in kohya's layout, as files of Stable Diffusion come."""

import torch
from safetensors.torch import save_file
from torch import nn

from lora_kernels import load_adapter
from lora_kernels.nn import disable_adapters, merge_adapters


class Block(nn.Module):
    """A residual of convolutions, then cross-attention to a prompt."""

    def __init__(self, width: int = 32, prompt: int = 24) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(prompt, width), nn.Linear(prompt, width)

    def forward(self, image: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] and [B, T, P] -> [B, C, H, W]"""
        image = image + self.conv2(self.conv1(image).relu())
        pixels = image.flatten(2).transpose(1, 2)
        k, v = self.to_k(prompt), self.to_v(prompt)
        seen = nn.functional.scaled_dot_product_attention(self.to_q(pixels), k, v)
        return image + self.to_out(seen).transpose(1, 2).view_as(image)


def kohya(block: nn.Module, rank: int = 4) -> dict[str, torch.Tensor]:
    """What a training script of diffusion models would have written for this block."""
    tensors = {}
    for name, layer in block.named_children():
        rows, cols, *window = layer.weight.shape
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, cols, *window) / 8
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, rank, *[1] * len(window)) / 8
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(rank / 2)
    return tensors


torch.manual_seed(0)
block, image, prompt = Block(), torch.randn(2, 32, 8, 8), torch.randn(2, 5, 24)
plain = block(image, prompt)
save_file(kohya(block), "style.safetensors")
load_adapter(block, "style.safetensors", "style")
styled = block(image, prompt)
with disable_adapters(block):
    print("off, it is the base:", torch.equal(block(image, prompt), plain))
merge_adapters(block)
print(f"merged: {(block(image, prompt) - styled).abs().max():.1e} from {(styled - plain).abs().max():.2f}")
