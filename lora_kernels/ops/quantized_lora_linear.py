"""The autograd of ``lora_linear`` over a quantised weight; the public function is in ``lora_linear.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant.weight import QuantizedWeight
from . import _dispatch
from ._lora_function import differentiable_backward, gate_rows, gradients, rows_of, transformable
from .dequantize import dequantize, parts, sizes
from .quantized_linear import accumulate


def fused_quantized(
    x: Tensor,
    weight: QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    x_lora: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``lora_linear.fused`` where the weight is quantised."""
    if bias is not None and bias.dtype != x.dtype:  # codes have no dtype, so that x may have any
        bias = bias.to(x.dtype)
    rest = (lora_a, lora_b, bias, gate, x_lora, scaling, dropout_p)
    if seed is None and _dispatch.functorch_active():
        return transformable(x, dequantize(weight, x.dtype), *rest)
    return QuantizedLoRALinear.apply(x, None, *rest, seed, *parts(weight), sizes(weight))


class QuantizedLoRALinear(torch.autograd.Function):
    """Saves of W the codes alone; the rest is saved as by ``LoRALinearFunction``, whose helpers this uses.

    The weight's place among the arguments holds ``None``, so that both count their gradients alike.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: None,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        x_lora: Tensor | None,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        codes: Tensor,
        scales: Tensor,
        nested: Tensor | None,
        sizes: tuple[Any, ...],
    ) -> Tensor:
        format, out, _, block = sizes
        if dropout_p > 0.0 and seed is None:
            seed = _dispatch.draw_seed(x)
        inputs = (
            rows_of(x),
            codes,
            scales,
            nested,
            lora_a,
            lora_b,
            bias,
            gate_rows(gate),
            rows_of(x_lora),
            seed,
        )
        ctx.backend = _dispatch.chosen("quantized_lora_linear", *inputs)
        y, h, mask = _dispatch.call(
            "quantized_lora_linear", *inputs, format, block, scaling, dropout_p, backend=ctx.backend
        )
        ctx.scaling, ctx.dropout_p, ctx.separate, ctx.sizes = scaling, dropout_p, x_lora is not None, sizes
        needs_x, _, needs_a, needs_b, _, needs_gate, needs_x_lora = ctx.needs_input_grad[:7]
        needs_mask = dropout_p > 0.0 and (needs_x or needs_a or needs_x_lora)
        ctx.save_for_backward(
            x if needs_a and x_lora is None else None,
            None,
            *(lora_a, lora_b, gate),
            x_lora if needs_a else None,
            h if needs_b or needs_gate else None,
            mask if needs_mask else None,
            *((codes, scales, nested) if needs_x else (None, None, None)),
        )
        return y.view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, codes, scales, nested = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if codes is not None:
                saved[1] = _dispatch.call("dequantize", codes, scales, nested, *ctx.sizes, dy.dtype)
            return (*differentiable_backward(ctx, dy, *saved), *(None,) * 4)
        dx, *grads = gradients(ctx, dy, *saved)
        if dx is not None:
            accumulate(rows_of(dx), rows_of(dy), (codes, scales, nested), ctx.sizes, True)
        return (dx, *grads, *(None,) * 4)
