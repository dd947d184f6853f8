"""The LoRA linear over a quantised W, in eager PyTorch."""

from __future__ import annotations

from torch import Tensor

from .._arguments import QuantizedInputs, flat
from .dequantize import dequantize
from .lora_linear import lora_linear


@flat(QuantizedInputs)
def quantized_lora_linear(inputs: QuantizedInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    codes, scales, nested = inputs.codes, inputs.scales, inputs.nested
    weight = dequantize(codes, scales, nested, *inputs.sizes, inputs.x.dtype)
    return lora_linear(*inputs.over(weight))
