"""The autograd of the fused LoRA linear, and what the Functions of its relatives share with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arguments import LoraBackward, LoraInputs
from ..reference.lora_linear import composite
from . import _dispatch


def rows_of(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` as [rows, features], one row if it is a vector."""
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


def output_like(rows: Tensor, like: Tensor) -> Tensor:
    """What a Function returns for ``rows``: in the leading dimensions of ``like``, and never a view.

    Autograd lets nobody write into a view that a Function returns, as a ReLU in place would.
    """
    lead = like.shape[:-1]
    return written(rows) if len(lead) == 1 else _anew(rows, (*lead, rows.shape[-1]))


def written(tensor: Tensor) -> Tensor:
    """What a Function returns for a ``tensor`` that it wrote into.

    Compiled, torch 2.11 gives such a tensor itself no gradient, without a word.
    """
    return _anew(tensor, tensor.shape) if torch.compiler.is_compiling() else tensor


def _anew(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same memory as a tensor of its own: nothing else reads what a Function returns."""
    return torch.ops.aten._unsafe_view.default(tensor, shape)


class LoRALinearFunction(torch.autograd.Function):
    """Saves h and one keep bit an element, and of the inputs only what the asked gradients read.

    Its arguments are those of :class:`LoraInputs`.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs = LoraInputs(*args)
        at_op = op_inputs(inputs)
        ctx.backend = _dispatch.chosen("lora_linear", *at_op)
        y, h, mask = _dispatch.call("lora_linear", *at_op, backend=ctx.backend)
        ctx.save_for_backward(*to_save(ctx, inputs, h, mask))
        return output_like(y, inputs.x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = Saved(*ctx.saved_tensors)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return differentiable_backward(ctx, dy, saved)
        return gradients(ctx, dy, saved)


class Saved(NamedTuple):
    """What a Function of this family keeps; ``None`` what no gradient that was asked for reads."""

    x: Tensor | None
    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor | None
    x_lora: Tensor | None
    h: Tensor | None
    mask: Tensor | None


def op_inputs(inputs: LoraInputs) -> LoraInputs:
    """As the op takes them: rows, and with dropout a seed."""
    x, weight, lora_a, lora_b, bias, gate, x_lora, seed, scaling, p = inputs
    if p > 0.0 and seed is None:
        seed = _dispatch.draw_seed(x)
    rows, branch = rows_of(x), rows_of(x_lora)
    return LoraInputs(rows, weight, lora_a, lora_b, bias, gate_rows(gate), branch, seed, scaling, p)


def to_save(ctx: Any, inputs: LoraInputs, h: Tensor, mask: Tensor) -> Saved:
    """Of the inputs only what the asked gradients read; ``ctx`` gets the numbers."""
    x, weight, lora_a, lora_b, _, gate, x_lora, _, ctx.scaling, ctx.dropout_p = inputs
    ctx.separate = x_lora is not None
    needs_x, needs_weight, needs_a, needs_b, _, needs_gate, needs_x_lora = ctx.needs_input_grad[:7]
    needs_mask = ctx.dropout_p > 0.0 and (needs_x or needs_a or needs_x_lora)
    return Saved(
        x if needs_weight or (needs_a and x_lora is None) else None,
        weight if needs_x or needs_weight else None,
        lora_a,
        lora_b,
        gate,
        x_lora if needs_a else None,
        h if needs_b or needs_gate else None,
        mask if needs_mask else None,
    )


def gradients(
    ctx: Any, dy: Tensor, saved: Saved, needs: Sequence[bool] | None = None
) -> tuple[Tensor | None, ...]:
    """One gradient for each of :class:`LoraInputs`, of those that ``needs`` asks for."""
    x, weight, lora_a, lora_b, gate, x_lora, h, mask = saved
    needs = ctx.needs_input_grad if needs is None else needs
    branch_needs = [needs[0], needs[2], needs[3], needs[5], needs[6]]
    rows, branch = rows_of(dy), rows_of(x_lora if ctx.separate else x) if needs[2] else None
    numbers = (ctx.scaling, ctx.dropout_p, ctx.separate, branch_needs)
    given = LoraBackward(rows, branch, weight, lora_a, lora_b, h, gate_rows(gate), mask, *numbers)
    grads = _dispatch.call("lora_linear_backward", *given, backend=ctx.backend)
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


def transformable(inputs: LoraInputs) -> Tensor:
    """The equation in PyTorch operations, which ``torch.func``'s transforms can all take apart."""
    x, p, mask = inputs.x, inputs.dropout_p, None
    rows = inputs._replace(x=rows_of(x), gate=gate_rows(inputs.gate), x_lora=rows_of(inputs.x_lora))
    if p > 0.0:
        # By the op, whose dispatch unwraps what the transforms wrapped.
        seed = _dispatch.draw_seed(x)
        mask = torch.ops.lora_kernels.dropout_mask.default(seed, *rows.branch.shape, p)
    return composite(rows, mask).view(*x.shape[:-1], inputs.lora_b.shape[0])


def gate_rows(gate: Tensor | None) -> Tensor | None:
    """g as [r], or as [rows, r] where it has one value a row."""
    return gate if gate is None or gate.dim() == 1 else rows_of(gate)


def spread(grads: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """The returned gradients at their places in ``_ops.GRADS``."""
    given = iter(grads)
    return [next(given) if needed else None for needed in needs]


def differentiable_backward(ctx: Any, dy: Tensor, saved: Saved) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the inputs, for ``create_graph=True``.

    The fused backward reads h as a constant, so a second derivative takes the composite path.
    """
    x, weight, lora_a, lora_b, gate, x_lora, _, mask = saved
    if x is None or (ctx.separate and x_lora is None):
        raise RuntimeError(
            "lora_linear: a double backward needs the input, which is not saved when no first"
            " derivative reads it (frozen lora_a, or an x_lora of its own)"
        )
    needs, rows = ctx.needs_input_grad[:7], rows_of(dy)
    tensors = (x, weight, lora_a, lora_b, None, gate, x_lora)
    wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed and tensor is not None]
    branch = (gate_rows(gate), rows_of(x_lora), None, ctx.scaling, ctx.dropout_p)
    y = composite(LoraInputs(rows_of(x), weight, lora_a, lora_b, None, *branch), mask)
    given = iter(torch.autograd.grad(y, wanted, rows, create_graph=True) if wanted else ())
    grads = [next(given) if n and t is not None else None for t, n in zip(tensors, needs, strict=True)]
    grads[4] = rows.sum(0) if needs[4] else None
    return (*grads, None, None, None)
