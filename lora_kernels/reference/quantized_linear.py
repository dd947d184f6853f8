"""out += x Wᵀ for a quantised W, in eager PyTorch."""

from __future__ import annotations

from .._arguments import QuantizedProduct, flat
from .dequantize import dequantize


@flat(QuantizedProduct)
def quantized_linear(inputs: QuantizedProduct) -> None:
    """The op of ``_ops.py``: out += x Wᵀ, or with ``transpose`` out += x W."""
    weight = dequantize(*inputs.weight, inputs.x.dtype)
    inputs.out.addmm_(inputs.x, weight if inputs.transpose else weight.T)
