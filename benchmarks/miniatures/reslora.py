"""ResLoRA: the first layer's factors get more gradient through the residual paths."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import side_inputs

CLAIM = (
    "in a chain of eight linears the gradient of the first layer's A is larger with bs and ms than with LoRA"
)
WIDTH, LAYERS, R = 24, 8, 4


def run(seed: int) -> dict[str, float]:
    """‖dA‖ of the first layer over LoRA's, at equal weights."""
    torch.manual_seed(seed)
    state = _chain().state_dict()
    factors = [(torch.randn(R, WIDTH) / WIDTH**0.5, 0.1 * torch.randn(WIDTH, R)) for _ in range(LAYERS)]
    x, want = torch.randn(32, WIDTH), torch.randn(32, WIDTH)
    norms = {}
    for name, options in (("lora", None), ("bs", {"mode": "bs"}), ("ms", {"mode": "ms"})):
        model = _chain()
        model.load_state_dict(state)
        config = LoRAConfig(r=R, lora_alpha=R, target_modules=["proj"])
        if options:
            config = LoRAConfig(
                r=R, lora_alpha=R, target_modules=["proj"], method="reslora", method_options=options
            )
        apply_lora(model, config)
        adapters = [block["proj"].adapters["default"] for block in model]
        with torch.no_grad():
            for adapter, (lora_a, lora_b) in zip(adapters, factors, strict=True):
                adapter.lora_A.copy_(lora_a)
                adapter.lora_B.copy_(lora_b)
        with side_inputs(model):
            (_through(model, x) - want).square().mean().backward()
        norms[name] = float(adapters[0].lora_A.grad.norm())
    return {f"{name}, gradient": norms[name] / norms["lora"] for name in ("bs", "ms")}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(ratio > 1 for one in figures for ratio in one.values())


def _chain() -> nn.Sequential:
    return nn.Sequential(*(nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH)}) for _ in range(LAYERS)))


def _through(model: nn.Sequential, x: Tensor) -> Tensor:
    for block in model:
        x = torch.tanh(block["proj"](x))
    return x
