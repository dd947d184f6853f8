"""MoSLoRA: with the mixer held at the identity it is LoRA; trained, it mixes subspaces at r² more numbers."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear

from ._change import left_of_change, random_change

CLAIM = "with M = I it is LoRA to rounding; with M trained a change of rank 4 is fitted to 1 % as well"
WIDTH, RANK, STEPS = 32, 4, 200


def run(seed: int) -> dict[str, float]:
    """How far a step with M = I is from LoRA's, and what is left of the change after training."""
    x, change = random_change(seed, WIDTH, RANK)
    layers = [
        LoRALinear(WIDTH, WIDTH, r=RANK, method="lora"),
        LoRALinear(WIDTH, WIDTH, r=RANK, method="moslora", method_options={"mixer": "eye"}),
    ]
    layers[1].load_state_dict({**layers[1].state_dict(), **layers[0].state_dict()})
    with torch.no_grad():
        for layer in layers:
            layer.adapters["default"].lora_B.copy_(change[:, :RANK])
    apart = float((layers[0](x) - layers[1](x)).detach().abs().max())
    mixed = LoRALinear(WIDTH, WIDTH, bias=False, r=RANK, lora_alpha=RANK, method="moslora")
    return {"M = I, from LoRA": apart, "left": left_of_change(mixed, x, change, STEPS)}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["M = I, from LoRA"] < 1e-5 and one["left"] < 0.01 for one in figures)
