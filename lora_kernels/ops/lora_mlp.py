"""The gated MLP of LoRA linears: the public function, its checks and the autograd of its second half."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ops
from .._arguments import LoraBackward, LoraInputs
from ..reference.glu import composite as glu_composite
from ..reference.lora_linear import composite
from . import _dispatch
from ._inputs import autocasts, cast, check, compute_dtype
from ._lora_function import output_like, rows_of, spread
from .lora_linear import fused
from .lora_linear_group import fused_group


class LoRAProjection(NamedTuple):
    """One of the three linears of :func:`lora_kernels.lora_mlp`: x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ

    Shapes: weight ``[N, K]``, lora_a ``[r, K]``, lora_b ``[N, r]``, bias ``[N]``; scaling and dropout_p
    are numbers.

    Examples:
        >>> weight, a, b = (torch.randn(*shape) for shape in ((8, 8), (2, 8), (8, 2)))
        >>> gate = LoRAProjection(weight, a, b, scaling=2.0)
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0
    bias: Tensor | None = None
    dropout_p: float = 0.0


def lora_mlp(
    x: Tensor,
    gate: LoRAProjection,
    up: LoRAProjection,
    down: LoRAProjection,
    activation: str = "silu",
    *,
    training: bool = True,
) -> Tensor:
    """y = down(act(gate(x)) ⊙ up(x)), each of the three a LoRA linear

    SwiGLU and GeGLU (Shazeer, 2020, arXiv 2002.05202) with LoRA (Hu et al., 2021, arXiv 2106.09685). The
    values and the gradients are those of three calls of :func:`lora_kernels.lora_linear` (the dropout masks
    too, drawn for gate, up and down in this order), but x is read once for gate and up, and neither act(gate)
    nor the product is kept for the backward pass, which computes the product anew from the outputs of gate
    and up.

    Shapes: x ``[..., K]``, gate and up K to M features, down M to N; y is ``[..., N]``.

    Dtypes: as for :func:`lora_kernels.lora_linear`. Gradients come in the dtype of their tensor.

    Args:
        x: the input. Any strides, any number of rows, none included.
        gate: the projection that the activation is applied to.
        up: the projection that is multiplied by it.
        down: the projection of the product.
        activation: ``"silu"``, ``"gelu"`` (by the error function) or ``"gelu_tanh"``.
        training: ``False`` switches dropout off.

    Raises:
        TypeError: an argument is not of the right type or dtype; the message names it and the projection.
        ValueError: a shape, a device, a probability or the activation does not fit; the message names it.
        BackendError: a backend forced by ``use_backend`` cannot run for these tensors.

    Examples:
        >>> gate = up = down = LoRAProjection(torch.randn(8, 8), torch.randn(2, 8), torch.randn(8, 2))
        >>> lora_mlp(torch.randn(3, 8), gate, up, down).shape
        torch.Size([3, 8])
    """
    if activation not in _ops.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(_ops.ACTIVATIONS)}, got {activation!r}")
    _check_projection("gate", gate, x)
    _check_projection("up", up, x)
    hidden = gate.lora_b.shape[0]
    if up.lora_b.shape[0] != hidden:
        raise ValueError(f"up: expected {hidden} out features, as gate has, got {up.lora_b.shape[0]}")
    _check_projection("down", down, x.new_empty(()).expand(*x.shape[:-1], hidden))
    if not training:
        gate, up, down = (one._replace(dropout_p=0.0) for one in (gate, up, down))
    return fused_mlp(x, gate, up, down, activation)


def _check_projection(name: str, given: Any, x: Tensor) -> None:
    if not isinstance(given, LoRAProjection):
        raise TypeError(f"{name}: expected a LoRAProjection, got {type(given).__name__}")
    if not isinstance(given.weight, Tensor):
        raise TypeError(f"{name}: weight: expected a Tensor, got {type(given.weight).__name__}")
    if not isinstance(given.scaling, (int, float)):
        raise TypeError(f"{name}: scaling: expected a number, got {type(given.scaling).__name__}")
    weight, lora_a, lora_b, _, bias, dropout_p = given
    try:
        check(LoraInputs(x, weight, lora_a, lora_b, bias, dropout_p=dropout_p))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def fused_mlp(
    x: Tensor, gate: LoRAProjection, up: LoRAProjection, down: LoRAProjection, activation: str
) -> Tensor:
    """:func:`lora_mlp` for arguments already known to fit: what modules call at every step."""
    if _dispatch.transformed() or _dispatch.sharded(x, gate.lora_a):
        return _linear(glu_composite(_linear(x, gate), _linear(x, up), activation), down)
    opened, raised = fused_group([_inputs(x, gate), _inputs(x, up)])
    weight, bias = down.weight, down.bias
    if autocasts(x):
        # Outside the Function, so that autograd casts the gradients back.
        dtype = compute_dtype(x)
        weight, bias = cast(weight, dtype), cast(bias, dtype)  # type: ignore[assignment]
    args = (weight, down.lora_a, down.lora_b, bias, down.scaling, down.dropout_p)
    if _dispatch.eager_cpp(opened, down.lora_a.shape[0]):
        in_cpp = torch.ops.lora_kernels.cpp_lora_glu_linear_autograd.default
        return in_cpp(opened, raised, *args, activation)  # type: ignore[no-any-return]
    return _GluLinear.apply(opened, raised, *args, activation)


def _linear(x: Tensor, to: LoRAProjection) -> Tensor:
    return fused(_inputs(x, to))


def _inputs(x: Tensor, to: LoRAProjection) -> LoraInputs:
    weight, lora_a, lora_b, scaling, bias, p = to
    return LoraInputs(x, weight, lora_a, lora_b, bias, None, None, None, scaling, p)


class _GluLinear(torch.autograd.Function):
    """The linear of act(gate) ⊙ up. Saves gate, up, h and one keep bit an element; not the product."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout_p: float,
        activation: str,
    ) -> Tensor:
        halves = rows_of(gate), rows_of(up)
        ctx.glu_backend = _dispatch.chosen("glu", *halves)
        product = _dispatch.call("glu", *halves, activation, backend=ctx.glu_backend)
        seed = _dispatch.draw_seed(product) if dropout_p > 0.0 else None
        inputs = LoraInputs(product, weight, lora_a, lora_b, bias, None, None, seed, scaling, dropout_p)
        ctx.backend = _dispatch.chosen("lora_linear", *inputs)
        y, h, mask = _dispatch.call("lora_linear", *inputs, backend=ctx.backend)
        ctx.scaling, ctx.dropout_p, ctx.activation = scaling, dropout_p, activation
        needs_gate, needs_up, needs_weight, needs_a, needs_b = ctx.needs_input_grad[:5]
        needs_product = needs_gate or needs_up
        needs_halves = needs_product or needs_weight or needs_a
        ctx.save_for_backward(
            gate if needs_halves else None,
            up if needs_halves else None,
            weight if needs_product or needs_weight else None,
            lora_a,
            lora_b,
            h if needs_b else None,
            mask if dropout_p > 0.0 and (needs_product or needs_a) else None,
        )
        return output_like(y, gate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, dy)
        gate, up, weight, lora_a, lora_b, h, mask = ctx.saved_tensors
        needs_gate, needs_up, needs_weight, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:6]
        rows, halves, product = rows_of(dy), (rows_of(gate), rows_of(up)), None
        if needs_weight or needs_a:
            product = _dispatch.call("glu", *halves, ctx.activation, backend=ctx.glu_backend)
        branch_needs = [needs_gate or needs_up, needs_a, needs_b, False, False]
        x, numbers = product if needs_a else None, (ctx.scaling, ctx.dropout_p, False, branch_needs)
        saved = LoraBackward(rows, x, weight, lora_a, lora_b, h, None, mask, *numbers)
        grads = _dispatch.call("lora_linear_backward", *saved, backend=ctx.backend)
        dproduct, da, db, _, _ = spread(grads, branch_needs)
        dweight = rows.T @ product if needs_weight else None
        del x, saved, product, grads  # before the next two of that size
        dgate, dup = None, None
        if dproduct is not None:
            both = _dispatch.call("glu_backward", dproduct, *halves, ctx.activation, backend=ctx.glu_backend)
            dgate = both[0].view(gate.shape) if needs_gate else None
            dup = both[1].view(up.shape) if needs_up else None
        return dgate, dup, dweight, da, db, rows.sum(0) if needs_bias else None, None, None, None


def _differentiable_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the inputs, for ``create_graph=True``."""
    gate, up, weight, lora_a, lora_b, _, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if gate is None:
        raise RuntimeError(
            "lora_mlp: a double backward needs the outputs of gate and up, which are not saved when no"
            " first derivative reads them (frozen but for down's lora_b)"
        )
    rows, inputs = rows_of(dy), (gate, up, weight, lora_a, lora_b)
    wanted = [tensor for tensor, needed in zip(inputs, needs[:5], strict=True) if needed]
    product = glu_composite(rows_of(gate), rows_of(up), ctx.activation)
    branch = (None, None, None, None, ctx.scaling, ctx.dropout_p)
    y = composite(LoraInputs(product, weight, lora_a, lora_b, *branch), mask)
    given = iter(torch.autograd.grad(y, wanted, rows, create_graph=True) if wanted else ())
    grads = [next(given) if needed else None for needed in needs[:5]]
    return (*grads, rows.sum(0) if needs[5] else None, None, None, None)
