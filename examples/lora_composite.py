"""Two adapters in one denoising loop: both at each step in one pass, or in turns."""

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compose import SwitchSchedule, composite_forward

denoiser = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))
for name in ("character", "style"):
    config = LoRAConfig(r=4, lora_alpha=64, target_modules=["0", "2"], init_lora_weights=False)
    apply_lora(denoiser, config, name)
names, switch = ["character", "style"], SwitchSchedule(["character", "style"], period=5)
with torch.no_grad():
    x = y = torch.randn(3, 8)
    for step in range(20):
        x = x - 0.05 * composite_forward(denoiser, names, x)
        switch.choose(denoiser, step)
        y = y - 0.05 * denoiser(y)
print(f"composite {x.norm():.3f}, switch {y.norm():.3f}")
