"""TA-LoRA: tasks that share a subspace, in fewer numbers than one LoRA each."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear, count_parameters, side_inputs

from ._change import fit

CLAIM = (
    "three changes of rank 4 in one subspace: fewer numbers than three LoRAs of r = 4, and a tenth of"
    " the error of one LoRA of r = 4 for all"
)
WIDTH, RANK, TASKS, STEPS = 32, 4, 3, 400


def run(seed: int) -> dict[str, float]:
    """Parameters over those of three LoRAs, and the mean squared errors."""
    torch.manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(WIDTH, RANK))[0] for _ in range(2))
    changes = torch.stack([u @ torch.randn(RANK, RANK) @ v.T for _ in range(TASKS)])
    x, task = torch.randn(TASKS * 64, WIDTH), torch.arange(TASKS).repeat_interleave(64)
    lora = LoRALinear(WIDTH, WIDTH, bias=False, r=RANK, lora_alpha=RANK)
    options = {"tasks": TASKS, "rank_tasks": TASKS}
    ours = LoRALinear(
        WIDTH, WIDTH, bias=False, r=RANK, lora_alpha=RANK / 2, method="ta_lora", method_options=options
    )
    figures = {}
    for name, layer in (("one LoRA", lora), ("TA-LoRA", ours)):
        want = x @ layer.weight.detach().T + torch.einsum("tok,tk->to", changes[task], x)

        def loss(layer: LoRALinear = layer, want: torch.Tensor = want) -> torch.Tensor:
            with side_inputs(layer, task=task):
                return (layer(x) - want).square().mean()

        figures[name] = fit(loss, layer, STEPS, 2e-2)
    count = count_parameters(ours)[0] / (TASKS * count_parameters(lora)[0])
    return {"parameters": count, **figures}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["parameters"] < 1 and one["TA-LoRA"] < 0.1 * one["one LoRA"] for one in figures)
