"""The autograd of the fused LoRA linear, and what the Functions of its relatives share with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.lora_linear import composite
from . import _dispatch


def rows_of(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` as [rows, features], one row if it is a vector."""
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


class LoRALinearFunction(torch.autograd.Function):
    """Saves h and one keep bit an element, and of the inputs only what the asked gradients read."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        x_lora: Tensor | None,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None = None,
    ) -> Tensor:
        if dropout_p > 0.0 and seed is None:
            seed = _dispatch.draw_seed(x)
        inputs = (rows_of(x), weight, lora_a, lora_b, bias, gate_rows(gate), rows_of(x_lora), seed)
        ctx.backend = _dispatch.chosen("lora_linear", *inputs)
        y, h, mask = _dispatch.call("lora_linear", *inputs, scaling, dropout_p, backend=ctx.backend)
        ctx.scaling, ctx.dropout_p, ctx.separate = scaling, dropout_p, x_lora is not None
        needs_x, needs_weight, needs_a, needs_b, _, needs_gate, needs_x_lora = ctx.needs_input_grad[:7]
        needs_mask = dropout_p > 0.0 and (needs_x or needs_a or needs_x_lora)
        ctx.save_for_backward(
            x if needs_weight or (needs_a and x_lora is None) else None,
            weight if needs_x or needs_weight else None,
            lora_a,
            lora_b,
            gate,
            x_lora if needs_a else None,
            h if needs_b or needs_gate else None,
            mask if needs_mask else None,
        )
        return y.view(*x.shape[:-1], lora_b.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return differentiable_backward(ctx, dy, *ctx.saved_tensors)
        return gradients(ctx, dy, *ctx.saved_tensors)


def gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    x_lora: Tensor | None,
    h: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument of the Function, from what it saved."""
    needs = ctx.needs_input_grad
    branch_needs = [needs[0], needs[2], needs[3], needs[5], needs[6]]
    rows, branch = rows_of(dy), x_lora if ctx.separate else x
    grads = _dispatch.call(
        "lora_linear_backward",
        *(rows, rows_of(branch) if needs[2] else None, weight, lora_a, lora_b, h),
        *(gate_rows(gate), mask, ctx.scaling, ctx.dropout_p, ctx.separate, branch_needs),
        backend=ctx.backend,
    )
    dx, da, db, dgate, dx_lora = spread(grads, branch_needs)
    lead = dy.shape[:-1]
    return (
        None if dx is None else dx.view(*lead, dx.shape[-1]),
        rows.T @ rows_of(x) if needs[1] else None,
        da,
        db,
        rows.sum(0) if needs[4] else None,
        None if dgate is None else dgate.view(gate.shape),
        None if dx_lora is None else dx_lora.view(*lead, dx_lora.shape[-1]),
        *(None, None, None),
    )


def transformable(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    x_lora: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """The equation in PyTorch operations, which ``torch.func``'s transforms can all take apart."""
    rows, mask = rows_of(x), None
    if dropout_p > 0.0:
        # By the op, whose dispatch unwraps what the transforms wrapped.
        mask = torch.ops.lora_kernels.dropout_mask.default(_dispatch.draw_seed(x), *rows.shape, dropout_p)
    y = composite(
        *(rows, weight, lora_a, lora_b, bias, gate_rows(gate), rows_of(x_lora), scaling, mask, dropout_p)
    )
    return y.view(*x.shape[:-1], lora_b.shape[0])


def gate_rows(gate: Tensor | None) -> Tensor | None:
    """g as [r], or as [rows, r] where it has one value a row."""
    return gate if gate is None or gate.dim() == 1 else rows_of(gate)


def spread(grads: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """The returned gradients at their places in ``_ops.GRADS``."""
    given = iter(grads)
    return [next(given) if needed else None for needed in needs]


def differentiable_backward(
    ctx: Any,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    x_lora: Tensor | None,
    h: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the inputs, for ``create_graph=True``.

    The fused backward reads h as a constant, so a second derivative takes the composite path.
    """
    if x is None or (ctx.separate and x_lora is None):
        raise RuntimeError(
            "lora_linear: a double backward needs the input, which is not saved when no first"
            " derivative reads it (frozen lora_a, or an x_lora of its own)"
        )
    needs = ctx.needs_input_grad
    inputs = (x, weight, lora_a, lora_b, None, gate, x_lora)
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=False) if needed and tensor is not None]
    rows = rows_of(dy)
    y = composite(
        *(rows_of(x), weight, lora_a, lora_b, None, gate_rows(gate), rows_of(x_lora)),
        *(ctx.scaling, mask, ctx.dropout_p),
    )
    given = iter(torch.autograd.grad(y, wanted, rows, create_graph=True) if wanted else ())
    grads = [next(given) if n and t is not None else None for t, n in zip(inputs, needs, strict=False)]
    grads[4] = rows.sum(0) if needs[4] else None
    return (*grads, None, None, None)
