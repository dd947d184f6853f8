"""MemVP: what an image says joins the feed-forward layers as keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_kernels.nn import MemVPMemory, apply_memvp, side_inputs

from ._fit import fit

CLAIM = (
    "outputs of a frozen feed-forward layer that turn with an image: with the image in the memory less"
    " than half of the loss is left, with the memory alone over 0.6, and the sequence gets no longer"
)
WIDTH, VISION, TOKENS, STEPS = 16, 8, 4, 300


def run(seed: int) -> dict[str, float]:
    """The part of the loss that is left."""
    figures = {}
    for name in ("memory alone", "with the image"):
        torch.manual_seed(seed)
        images, text = torch.randn(64, TOKENS, VISION), torch.randn(64, 6, WIDTH)
        seen = torch.tanh(images.mean(1) * 2 @ torch.randn(VISION, WIDTH))[:, None] * torch.tanh(
            text[..., :1]
        )
        model = _Model()
        with torch.no_grad():
            want = model(text) + seen
        apply_memvp(model, ["ffn"], scale=1.0, dropout=0.0)
        memory = MemVPMemory(WIDTH, entries=16, vision_width=VISION, bottleneck=32)
        shown = images if name == "with the image" else None

        def loss(
            model: nn.Module = model,
            memory: nn.Module = memory,
            shown: Tensor | None = shown,
            text: Tensor = text,
            want: Tensor = want,
        ) -> Tensor:
            with side_inputs(model, memory=memory(shown, len(text))):
                return (model(text) - want).square().mean()

        figures[name] = fit(loss, memory.parameters(), STEPS, 2e-2)
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["with the image"] < 0.5 and one["memory alone"] > 0.6 for one in figures)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)
