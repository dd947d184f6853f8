"""The LoRA linear over a quantised weight: one launch for few rows, else the passes of *beta*."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import QuantizedInputs, flat
from .config import QUANTIZED_RANK, QUANTIZED_ROWS
from .passes import branch_pass
from .quantized_linear import launch, quantized_linear


@flat(QuantizedInputs)
def quantized_lora_linear(inputs: QuantizedInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    x, _, lora_a, lora_b, bias, gate, x_lora, seed, scaling, dropout_p = over = inputs.over(None)
    weight, rank = (inputs.codes, inputs.scales, inputs.nested, *inputs.sizes), lora_a.shape[0]
    y = x.new_empty(x.shape[0], lora_b.shape[0])
    if seed is None and x_lora is None and x.shape[0] <= QUANTIZED_ROWS and rank <= QUANTIZED_RANK:
        h = x.new_empty(x.shape[0], rank)
        launch(y, x, weight, (lora_a, lora_b), bias, gate, scaling, h)
        return y, h, x.new_empty(0, dtype=torch.uint8)
    h, mask = branch_pass(over.branch, lora_a, seed, dropout_p, lora_b, bias, gate, scaling, y)
    quantized_linear(y, x, *weight, False)
    return y, h, mask
