"""RST-LoRA: marked tokens that matter are learnt from sooner."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear, side_inputs

from ._change import fit, random_change

CLAIM = (
    "where a quarter of the tokens carry the label, doubling their inputs gives a smaller loss after 60 steps"
    " than LoRA, and than doubling as many others"
)
WIDTH, RANK, DOCUMENTS, TOKENS, STEPS = 16, 4, 32, 12, 60


def run(seed: int) -> dict[str, float]:
    """The loss after training on the label, the mean over tokens of what they say."""
    _, change = random_change(seed, WIDTH, RANK)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(DOCUMENTS, TOKENS, WIDTH, generator=generator)
    marked = torch.zeros(DOCUMENTS, TOKENS)
    marked[:, : TOKENS // 4] = 1
    others = marked.roll(TOKENS // 2, 1)
    figures = {}
    for name, gamma in (("LoRA", 0 * marked), ("marked", marked), ("others", others)):
        torch.manual_seed(seed)
        layer = LoRALinear(WIDTH, WIDTH, bias=False, r=RANK, lora_alpha=RANK, method="rst_lora")
        base = (x @ layer.weight.detach().T).mean(1)
        want = base + (marked[..., None] * (x @ change.T)).mean(1)

        def loss(
            layer: LoRALinear = layer, gamma: torch.Tensor = gamma, want: torch.Tensor = want
        ) -> torch.Tensor:
            with side_inputs(layer, token_scale=1 + gamma):
                return (layer(x).mean(1) - want).square().mean()

        figures[name] = fit(loss, layer, STEPS, 1e-2)
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["marked"] < min(one["LoRA"], one["others"]) for one in figures)
