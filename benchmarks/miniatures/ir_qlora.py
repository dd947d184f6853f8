"""IR-QLoRA: offsets for each block leave NF4's codes more information and the weight less error."""

from __future__ import annotations

import torch

from lora_kernels import dequantize, quantize
from lora_kernels.quant import icq_quantize
from lora_kernels.quant.grouped import nf4_entropy

CLAIM = "on blocks that are off centre the codes gain 0.1 bit of entropy, and the weight's error falls"
BLOCKS, BLOCK = 128, 64


def run(seed: int) -> dict[str, float]:
    """Mean entropy of the codes, and the mean square error of the weight, with and without offsets."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(BLOCKS, BLOCK, generator=generator)
    weight += 0.01 * torch.randn(BLOCKS, 1, generator=generator)
    codes, offsets = icq_quantize(weight, BLOCK, count=20)
    plain = dequantize(quantize(weight, "nf4", block_size=BLOCK))
    return {
        "bits": float(nf4_entropy(weight).mean()),
        "bits, calibrated": float(nf4_entropy(weight - offsets).mean()),
        "error": float((plain - weight).square().mean()),
        "error, calibrated": float((dequantize(codes) + offsets - weight).square().mean()),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, for each seed."""
    return all(
        one["bits, calibrated"] > one["bits"] + 0.1 and one["error, calibrated"] < one["error"]
        for one in figures
    )
