"""The fused DoRA linear: the public function, its checks and its autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arguments import DoraBackward, DoraInputs, LoraInputs
from ..quant.weight import QuantizedWeight
from ..reference.dora_linear import composite
from ..reference.dropout import dropout_apply
from ..reference.low_rank_norm import low_rank_norm as row_norm
from . import _dispatch
from ._inputs import autocasts, cast, check, compute_dtype
from ._lora_function import output_like, rows_of, spread
from .dequantize import dequantize
from .low_rank_norm import low_rank_norm


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """y = c ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + b with c = m / ‖W + s B A‖ by row

    DoRA (Liu et al., 2024, arXiv 2402.09353). Under dropout it is PEFT's function,
    y = x Wᵀ + b + (c - 1) ⊙ (d Wᵀ) + c ⊙ (s (d Aᵀ) Bᵀ) with d = drop(x): the base keeps the whole x and
    what DoRA changes of it sees d. The norm is a constant for the gradients, as in the paper.

    Shapes: x ``[..., K]``, weight ``[N, K]``, lora_a ``[r, K]``, lora_b ``[N, r]``, magnitude and bias
    ``[N]``; y is ``[..., N]``.

    Dtypes: as :func:`lora_kernels.lora_linear`; the magnitude is of any floating dtype and c is computed
    in at least float32.

    Args:
        x: the input. Any strides, any number of rows, none included.
        weight: the base weight W.
        lora_a: the down-projection A.
        lora_b: the up-projection B.
        magnitude: m, the length of each row of the adapted weight.
        scaling: s.
        bias: b.
        dropout_p: probability in [0, 1) that an element of d is dropped.
        training: ``False`` switches dropout off.

    Raises:
        TypeError: an argument is not a tensor, or of the wrong dtype.
        ValueError: a shape, a device or ``dropout_p`` does not fit; the message names it.
        BackendError: a backend forced by ``use_backend`` cannot run for these tensors.

    Examples:
        >>> x, weight, a, b = (torch.randn(*shape) for shape in ((2, 8), (4, 8), (2, 8), (4, 2)))
        >>> dora_linear(x, weight, a, b, magnitude=weight.norm(dim=1)).shape
        torch.Size([2, 4])
    """
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling: expected a number, got {type(scaling).__name__}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor, got {type(weight).__name__}")
    check(LoraInputs(x, weight, lora_a, lora_b, bias, dropout_p=dropout_p))
    _check_magnitude(magnitude, weight)
    return fused_dora(
        x, weight, lora_a, lora_b, magnitude, bias, float(scaling), dropout_p if training else 0.0
    )


def _check_magnitude(magnitude: Tensor, weight: Tensor) -> None:
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"magnitude: expected a Tensor, got {type(magnitude).__name__}")
    if not magnitude.is_floating_point():
        raise TypeError(f"magnitude: expected a floating dtype, got {magnitude.dtype}")
    if magnitude.device != weight.device:
        raise ValueError(f"magnitude: expected device {weight.device} (x's), got {magnitude.device}")
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(
            f"magnitude: expected [weight rows], {tuple(weight.shape[:1])}, got {tuple(magnitude.shape)}"
        )


def output_scale(
    weight: Tensor | QuantizedWeight, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, scaling: float
) -> Tensor:
    """c = m / ‖W + s B A‖ by row, in at least float32; differentiable in m alone.

    A quantised W is dense for as long as its norms take.
    """
    if isinstance(weight, QuantizedWeight):
        weight = dequantize(weight, torch.promote_types(magnitude.dtype, torch.float32))
    if _dispatch.transformed():
        tensors = (weight.detach(), lora_a.detach(), lora_b.detach())
        return magnitude / row_norm(*tensors, scaling)
    return magnitude / low_rank_norm(weight, lora_a, lora_b, scaling)


def fused_dora(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """:func:`dora_linear` for arguments already known to fit: what modules call at every step."""
    scale = output_scale(weight, lora_a, lora_b, magnitude, scaling)
    return scaled_dora(x, weight, lora_a, lora_b, scale, bias, scaling, dropout_p)


def scaled_dora(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """:func:`fused_dora` where c is known already."""
    if autocasts(x):
        # Outside the Function, so that autograd casts the gradients back. The norm is of W as it is.
        dtype = compute_dtype(x)
        x, weight, bias = (cast(t, dtype) for t in (x, weight, bias))
    apply = _transformable if _dispatch.transformed() else _DoRALinear.apply
    return apply(x, weight, lora_a, lora_b, scale, bias, None, scaling, dropout_p)


def _transformable(*args: Any) -> Tensor:
    """The equation in PyTorch operations, which ``torch.func``'s transforms can all take apart."""
    inputs, mask = DoraInputs(*args), None
    rows = inputs._replace(x=rows_of(inputs.x))
    if inputs.dropout_p > 0.0:
        seed = _dispatch.draw_seed(inputs.x)
        mask = torch.ops.lora_kernels.dropout_mask.default(seed, *rows.x.shape, inputs.dropout_p)
    return composite(rows, mask).view(*inputs.x.shape[:-1], inputs.lora_b.shape[0])


class _DoRALinear(torch.autograd.Function):
    """Saves h, z and one keep bit an element, and of the inputs only what the asked gradients read.

    Its arguments are those of :class:`DoraInputs` up to ``dropout_p``.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, lora_a, lora_b, scale, bias, _, scaling, dropout_p = args
        seed = _dispatch.draw_seed(x) if dropout_p > 0.0 else None
        needs_x, needs_weight, needs_a, needs_b, needs_scale = ctx.needs_input_grad[:5]
        tensors = (rows_of(x), weight, lora_a, lora_b, scale, bias, seed)
        inputs = DoraInputs(*tensors, scaling, dropout_p, needs_scale)
        ctx.backend = _dispatch.chosen("dora_linear", *inputs)
        y, z, h, mask = _dispatch.call("dora_linear", *inputs, backend=ctx.backend)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.save_for_backward(
            x if needs_weight or needs_a else None,
            weight,
            lora_a,
            lora_b,
            scale,
            z if needs_scale else None,
            h if needs_b else None,
            mask if dropout_p > 0.0 and (needs_x or needs_a or needs_weight) else None,
        )
        return output_like(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, dy)
        x, weight, lora_a, lora_b, scale, z, h, mask = ctx.saved_tensors
        needs_x, needs_weight, *rest, needs_bias = ctx.needs_input_grad[:6]
        rows, needs = rows_of(dy), [needs_x, *rest]
        x_rows, numbers = rows_of(x) if rest[0] else None, (ctx.scaling, ctx.dropout_p, needs)
        saved = DoraBackward(rows, x_rows, weight, lora_a, lora_b, scale, z, h, mask, *numbers)
        grads = _dispatch.call("dora_linear_backward", *saved, backend=ctx.backend)
        dx, da, db, dscale = spread(grads, needs)
        return (
            None if dx is None else dx.view(*dy.shape[:-1], dx.shape[-1]),
            _grad_weight(rows, rows_of(x), scale, mask, ctx.dropout_p) if needs_weight else None,
            da,
            db,
            dscale,
            rows.sum(0) if needs_bias else None,
            *(None, None, None),
        )


def _grad_weight(dy: Tensor, x: Tensor, scale: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    dz = (dy * scale).to(dy.dtype)
    if mask is None:
        return dz.T @ x
    dropped = dropout_apply(x, mask, dropout_p)
    return (dz.T @ dropped).addmm_(dy.T, x - dropped)


def _differentiable_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the inputs, for ``create_graph=True``."""
    x, weight, lora_a, lora_b, scale, _, _, mask = ctx.saved_tensors
    if x is None:
        raise RuntimeError(
            "dora_linear: a double backward needs the input, which is not saved when no first"
            " derivative reads it (frozen lora_a)"
        )
    needs, rows = ctx.needs_input_grad[:6], rows_of(dy)
    tensors = (x, weight, lora_a, lora_b, scale)
    wanted = [tensor for tensor, needed in zip(tensors, needs[:5], strict=True) if needed]
    numbers = (None, None, ctx.scaling, ctx.dropout_p)
    y = composite(DoraInputs(rows_of(x), weight, lora_a, lora_b, scale, *numbers), mask)
    given = iter(torch.autograd.grad(y, wanted, rows, create_graph=True) if wanted else ())
    grads = [next(given) if needed else None for needed in needs[:5]]
    return (*grads, rows.sum(0) if needs[5] else None, None, None, None)
