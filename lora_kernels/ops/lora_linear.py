"""The fused LoRA linear: the public function, its checks and its autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant.weight import QuantizedWeight
from ..reference.lora_linear import composite
from . import _dispatch

_TENSORS = ("x", "weight", "lora_a", "lora_b", "bias", "gate", "x_lora")
_OPTIONAL = frozenset({"weight", "bias", "gate", "x_lora"})


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    gate: Tensor | None = None,
    x_lora: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """y = x Wᵀ + b + s · ((drop(x_lora) Aᵀ) ⊙ g) Bᵀ

    LoRA (Hu et al., 2021, arXiv 2106.09685) with an optional gate on the rank (SoRA, AdaLoRA, routers).

    Shapes: x ``[..., K]``, weight ``[N, K]`` (dense, or of :func:`lora_kernels.quantize`: QLoRA, arXiv
    2305.14314) or ``None`` (the branch alone), lora_a ``[r, K]``,
    lora_b ``[N, r]``, bias ``[N]``, gate ``[r]`` or ``[..., r]``, x_lora like x; y is ``[..., N]``.

    Dtypes: x, weight, bias and x_lora share one floating dtype, which is y's; lora_a, lora_b and gate
    may be of another (fp32 adapters on a half-precision base), they are cast and x never is. Under
    autocast everything is cast to autocast's dtype. Gradients come in the dtype of their tensor.

    Args:
        x: the input. Any strides, any number of rows, none included.
        weight: the base weight, frozen or trainable; a quantised one is frozen, and of any dtype.
        lora_a: the down-projection A; a strided view is not copied.
        lora_b: the up-projection B; a strided view is not copied.
        scaling: s, a number or a tensor of one element (which may require grad).
        bias: b.
        dropout_p: probability in [0, 1) that an element of the branch's input is dropped. The mask
            is drawn from torch's generator of x's device.
        gate: g, the same for all rows or one per row.
        x_lora: the branch's input where it differs from x.
        training: ``False`` switches dropout off.

    Raises:
        TypeError: an argument is not a tensor, or of the wrong dtype.
        ValueError: a shape, a device or ``dropout_p`` does not fit; the message names it.
        BackendError: a backend forced by ``use_backend`` cannot run for these tensors.
    """
    _check(x, weight, lora_a, lora_b, bias, gate, x_lora, dropout_p)
    if isinstance(scaling, Tensor):
        gate, scaling = _scaling_as_gate(scaling, gate, lora_a), 1.0
    elif not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling: expected a number or a Tensor, got {type(scaling).__name__}")
    p = dropout_p if training else 0.0
    return fused(x, weight, lora_a, lora_b, bias, gate, x_lora, scaling, p)


def fused(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    x_lora: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`lora_linear` for arguments already known to fit: what modules call at every step.

    ``seed``: of the dropout, where it is not to be drawn here.
    """
    if _dispatch.sharded(x, lora_a):
        if isinstance(weight, QuantizedWeight):
            raise TypeError("weight: expected a DTensor beside the others, got a QuantizedWeight")
        from . import dtensor  # not at the top: torch.distributed.tensor takes long to import

        return dtensor.on_shards(x, weight, lora_a, lora_b, bias, gate, x_lora, scaling, dropout_p)
    if _autocasts(x):
        # Outside the Function, so that autograd casts the gradients back.
        dtype = _compute_dtype(x)
        x, weight, bias, x_lora = (_cast(t, dtype) for t in (x, weight, bias, x_lora))
    if isinstance(weight, QuantizedWeight):
        from .quantized_lora_linear import fused_quantized

        return fused_quantized(x, weight, lora_a, lora_b, bias, gate, x_lora, scaling, dropout_p, seed)
    args = (x, weight, lora_a, lora_b, bias, gate, x_lora, scaling, dropout_p)
    if seed is None:
        if _dispatch.functorch_active():
            return _transformable(*args)
        if _dispatch.eager_cpp(x, lora_a.shape[0]):
            return torch.ops.lora_kernels.cpp_lora_linear_autograd.default(*args)
    return _LoRALinear.apply(*args, seed)


def _scaling_as_gate(scaling: Tensor, gate: Tensor | None, lora_a: Tensor) -> Tensor:
    """s as part of g, so that autograd carries its gradient from g's."""
    if not scaling.is_floating_point():
        raise TypeError(f"scaling: expected a floating dtype, got {scaling.dtype}")
    if scaling.device != lora_a.device:
        raise ValueError(f"scaling: expected device {lora_a.device} (x's), got {scaling.device}")
    if scaling.numel() != 1:
        raise ValueError(f"scaling: expected one element, got shape {tuple(scaling.shape)}")
    flat = scaling.reshape(1)
    return flat.expand(lora_a.shape[0]) if gate is None else gate * flat


def _check(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    x_lora: Tensor | None,
    dropout_p: float,
) -> None:
    """Raises what :func:`lora_linear` promises. The usual call passes with a few comparisons."""
    _check_types((x, weight, lora_a, lora_b, bias, gate, x_lora), dropout_p)
    if lora_a.dim() != 2 or lora_b.dim() != 2:
        bad = "lora_a" if lora_a.dim() != 2 else "lora_b"
        raise ValueError(f"{bad}: expected 2 dimensions, got {(lora_a if bad == 'lora_a' else lora_b).dim()}")
    rank, cols = lora_a.shape
    rows_out = lora_b.shape[0]
    _check_shape("x", x, (cols,), x.shape[-1:], "its last dimension, by lora_a,")
    _check_shape("lora_b", lora_b, (rows_out, rank), lora_b.shape, "[out features, rank of lora_a]")
    if weight is not None:
        _check_shape("weight", weight, (rows_out, cols), weight.shape, "[lora_b rows, lora_a columns]")
    if bias is not None:
        _check_shape("bias", bias, (rows_out,), bias.shape, "[lora_b rows]")
    if x_lora is not None:
        _check_shape("x_lora", x_lora, tuple(x.shape), x_lora.shape, "the shape of x")
    if gate is not None and gate.shape != (rank,):
        _check_shape("gate", gate, (*x.shape[:-1], rank), gate.shape, "[rank] or x's rows and [rank]")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    _check_dtypes(x, weight, lora_a, lora_b, bias, gate, x_lora)


def _check_types(tensors: tuple[Any, ...], dropout_p: Any) -> None:
    for name, value in zip(_TENSORS, tensors, strict=True):
        if name == "weight" and isinstance(value, QuantizedWeight):
            continue
        if not isinstance(value, Tensor) and not (value is None and name in _OPTIONAL):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")


def _check_shape(name: str, value: Any, want: tuple[int, ...], got: Any, words: str) -> None:
    if tuple(got) != want:
        raise ValueError(f"{name}: expected {words} to be {want}, got shape {tuple(value.shape)}")


def _check_dtypes(x: Tensor, *others: Any) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    names = ("weight", "lora_a", "lora_b", "bias", "gate", "x_lora")
    for name, other in zip(names, others, strict=True):
        if other is None:
            continue
        if other.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (x's), got {other.device}")
        if isinstance(other, QuantizedWeight):
            continue
        same = name in ("weight", "bias", "x_lora")
        if other.dtype != x.dtype and (not other.is_floating_point() or (same and not _autocasts(x))):
            want = f"{x.dtype} (x's)" if same else "a floating dtype"
            raise TypeError(f"{name}: expected {want}, got {other.dtype}")


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # meta has no autocast, and asking raises


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``F.linear`` would compute in."""
    if _autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor.to(dtype) if isinstance(tensor, Tensor) else tensor


def _rows(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` as [rows, features], one row if it is a vector."""
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


class _LoRALinear(torch.autograd.Function):
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
        inputs = (_rows(x), weight, lora_a, lora_b, bias, _gate_rows(gate), _rows(x_lora), seed)
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
            return _differentiable_backward(ctx, dy, *ctx.saved_tensors)
        return _gradients(ctx, dy, *ctx.saved_tensors)


def _gradients(
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
    rows, branch = _rows(dy), x_lora if ctx.separate else x
    grads = _dispatch.call(
        "lora_linear_backward",
        *(rows, _rows(branch) if needs[2] else None, weight, lora_a, lora_b, h),
        *(_gate_rows(gate), mask, ctx.scaling, ctx.dropout_p, ctx.separate, branch_needs),
        backend=ctx.backend,
    )
    dx, da, db, dgate, dx_lora = _spread(grads, branch_needs)
    lead = dy.shape[:-1]
    return (
        None if dx is None else dx.view(*lead, dx.shape[-1]),
        rows.T @ _rows(x) if needs[1] else None,
        da,
        db,
        rows.sum(0) if needs[4] else None,
        None if dgate is None else dgate.view(gate.shape),
        None if dx_lora is None else dx_lora.view(*lead, dx_lora.shape[-1]),
        *(None, None, None),
    )


def _transformable(
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
    rows, mask = _rows(x), None
    if dropout_p > 0.0:
        # By the op, whose dispatch unwraps what the transforms wrapped.
        mask = torch.ops.lora_kernels.dropout_mask.default(_dispatch.draw_seed(x), *rows.shape, dropout_p)
    y = composite(
        *(rows, weight, lora_a, lora_b, bias, _gate_rows(gate), _rows(x_lora), scaling, mask, dropout_p)
    )
    return y.view(*x.shape[:-1], lora_b.shape[0])


def _gate_rows(gate: Tensor | None) -> Tensor | None:
    """g as [r], or as [rows, r] where it has one value a row."""
    return gate if gate is None or gate.dim() == 1 else _rows(gate)


def _spread(grads: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """The returned gradients at their places in ``_ops.GRADS``."""
    given = iter(grads)
    return [next(given) if needed else None for needed in needs]


def _differentiable_backward(
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
    rows = _rows(dy)
    y = composite(
        *(_rows(x), weight, lora_a, lora_b, None, _gate_rows(gate), _rows(x_lora)),
        *(ctx.scaling, mask, ctx.dropout_p),
    )
    given = iter(torch.autograd.grad(y, wanted, rows, create_graph=True) if wanted else ())
    grads = [next(given) if n and t is not None else None for t, n in zip(inputs, needs, strict=False)]
    grads[4] = rows.sum(0) if needs[4] else None
    return (*grads, None, None, None)
