"""The autograd of ``lora_linear`` over a quantised weight; the public function is in ``lora_linear.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arguments import LoraInputs, QuantizedInputs
from . import _dispatch
from ._lora_function import (
    Saved,
    differentiable_backward,
    gradients,
    op_inputs,
    output_like,
    rows_of,
    to_save,
    transformable,
)
from .dequantize import dequantize, parts, sizes
from .quantized_linear import accumulate

_INPUTS = len(LoraInputs._fields)


def fused_quantized(inputs: LoraInputs) -> Tensor:
    """``lora_linear.fused`` where the weight is quantised."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    if bias is not None and bias.dtype != x.dtype:  # codes have no dtype, so that x may have any
        inputs = inputs._replace(bias=bias.to(x.dtype))
    if inputs.seed is None and _dispatch.transformed():
        return transformable(inputs._replace(weight=dequantize(weight, x.dtype)))
    return QuantizedLoRALinear.apply(*inputs._replace(weight=None), *parts(weight), sizes(weight))


class QuantizedLoRALinear(torch.autograd.Function):
    """Saves of W the codes alone; the rest is saved as by ``LoRALinearFunction``, whose helpers this uses.

    Its arguments are those of :class:`LoraInputs` with ``None`` for the weight, and its parts and sizes.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs = LoraInputs(*args[:_INPUTS])
        codes, scales, nested, ctx.sizes = args[_INPUTS:]
        format, _, _, block = ctx.sizes
        x, _, a, b, bias, gate, x_lora, seed, scaling, p = op_inputs(inputs)
        branch = (a, b, bias, gate, x_lora, seed)
        at_op = QuantizedInputs(x, codes, scales, nested, *branch, format, block, scaling, p)
        ctx.backend = _dispatch.chosen("quantized_lora_linear", *at_op)
        y, h, mask = _dispatch.call("quantized_lora_linear", *at_op, backend=ctx.backend)
        packed = (codes, scales, nested) if ctx.needs_input_grad[0] else (None, None, None)
        ctx.save_for_backward(*to_save(ctx, inputs, h, mask), *packed)
        return output_like(y, inputs.x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, codes, scales, nested = ctx.saved_tensors
        saved = Saved(*kept)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if codes is not None:
                weight = _dispatch.call("dequantize", codes, scales, nested, *ctx.sizes, dy.dtype)
                saved = saved._replace(weight=weight)
            return (*differentiable_backward(ctx, dy, saved), *(None,) * 4)
        needs_x, *needs = ctx.needs_input_grad
        dx, *grads = gradients(ctx, dy, saved, [needs_x and not ctx.separate, *needs])
        if needs_x:
            dx = dy.new_zeros(*dy.shape[:-1], ctx.sizes[2]) if dx is None else dx
            accumulate(rows_of(dx), rows_of(dy), (codes, scales, nested), ctx.sizes, True)
        return (dx, *grads, *(None,) * 4)
