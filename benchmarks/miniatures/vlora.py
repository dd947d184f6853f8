"""VLoRA: what an image says comes in by weights, and the sequence gets no longer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import VLoRAGenerator, side_inputs

from ._fit import fit

CLAIM = (
    "texts whose outputs turn with an image: with factors made of the image a tenth of the loss is left,"
    " without it (one LoRA for all) over half, and as many tokens go through the model"
)
WIDTH, VISION, TOKENS, STEPS = 16, 8, 4, 150


def run(seed: int) -> dict[str, float]:
    """The part of the loss that is left, and the tokens of a sample."""
    torch.manual_seed(seed)
    images, text = torch.randn(64, TOKENS, VISION), torch.randn(64, 6, WIDTH)
    to, out = torch.randn(VISION, WIDTH), torch.randn(WIDTH) / WIDTH**0.5
    direction = images.mean(1) @ to / 2
    seen = (text @ direction[..., None]) * out
    models = [_Model() for _ in range(2)]
    plain = apply_lora(models[0], LoRAConfig(r=2, target_modules=["proj"]))
    ours = apply_lora(models[1], LoRAConfig(r=2, target_modules=["proj"], method="vlora"))
    generator = VLoRAGenerator(ours, VISION, TOKENS, width=32, depth=1, heads=2)

    def with_image() -> Tensor:
        with side_inputs(ours, vlora_A=generator(images)):
            return ours(text)

    figures = {"tokens": float(text.shape[1])}
    trained = {"LoRA": plain, "VLoRA": nn.ModuleList([ours, generator])}
    for name, model in (("LoRA", lambda: plain(text)), ("VLoRA", with_image)):
        with torch.no_grad():
            want = model() + seen
        parameters = [p for p in trained[name].parameters() if p.requires_grad]
        figures[name] = fit(
            lambda model=model, want=want: (model() - want).square().mean(), parameters, STEPS, 1e-2
        )
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["VLoRA"] < 0.1 and one["LoRA"] > 0.5 and one["tokens"] == 6 for one in figures)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)
