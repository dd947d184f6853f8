"""An adapter in kohya's layout, as training scripts of diffusion models write it, loads as it is."""

import torch
from safetensors.torch import save_file
from torch import nn

from lora_kernels import load_adapter, save_adapter

unet = nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3), "to_q": nn.Linear(8, 8)})
tensors = {
    "lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3),
    "lora_unet_conv_in.lora_up.weight": torch.randn(8, 2, 1, 1),
    "lora_unet_conv_in.alpha": torch.tensor(1.0),
    "lora_unet_to_q.lora_down.weight": torch.randn(4, 8),
    "lora_unet_to_q.lora_up.weight": torch.randn(8, 4),
}
save_file(tensors, "style.safetensors")
load_adapter(unet, "style.safetensors", "style")
save_adapter(unet, "style", "style")  # and from here on it is PEFT's
for name in ("conv_in", "to_q"):
    print(name, unet[name].adapters["style"])
