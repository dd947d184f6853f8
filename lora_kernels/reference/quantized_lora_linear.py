"""The LoRA linear over a quantised W, in eager PyTorch."""

from __future__ import annotations

from torch import Tensor

from .dequantize import dequantize
from .lora_linear import lora_linear


def quantized_lora_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    x_lora: Tensor | None,
    seed: Tensor | None,
    format: str,
    block: int,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    shape = (lora_b.shape[0], lora_a.shape[1])
    weight = dequantize(codes, scales, nested, format, *shape, block, x.dtype)
    return lora_linear(x, weight, lora_a, lora_b, bias, gate, x_lora, seed, scaling, dropout_p)
