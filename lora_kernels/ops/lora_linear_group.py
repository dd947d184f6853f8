"""LoRA linears that read one x: the public function, its checks and its autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._arguments import GroupBackward, GroupInputs, LoraInputs
from ..quant.weight import QuantizedWeight
from ..reference.lora_linear import composite
from . import _dispatch
from ._inputs import autocasts, cast, check, compute_dtype
from ._lora_function import gate_rows, output_like, rows_of
from .dequantize import parts, sizes
from .lora_linear import fused as fused_single
from .quantized_linear import accumulate

_PARTS = ("weights", "lora_as", "lora_bs", "biases", "gates")
# Arguments of the Function before the tensors of the members, x the last of them.
_LEAD = 4


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor | QuantizedWeight],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: float | Sequence[float] = 1.0,
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout_p: float | Sequence[float] = 0.0,
    gates: Sequence[Tensor | None] | None = None,
    training: bool = True,
) -> tuple[Tensor, ...]:
    """y_i = x W_iᵀ + b_i + s_i · ((drop_i(x) A_iᵀ) ⊙ g_i) B_iᵀ for i = 1 … G

    What query, key and value projections do, or the gate and up projections of an MLP: the values and
    the gradients of G calls of :func:`lora_kernels.lora_linear`, each with a dropout mask of its own
    (drawn in the order of the members: after one ``manual_seed`` the masks are those of the G calls),
    but x is read once for all h and once for all dA, it is saved once, and the gradients of x are
    accumulated by the products that make them.

    Shapes: x ``[..., K]``, weights ``[N_i, K]``, lora_as ``[r_i, K]``, lora_bs ``[N_i, r_i]``, biases
    ``[N_i]``, gates ``[r_i]`` or ``[..., r_i]``; y_i is ``[..., N_i]``.

    Dtypes: as for :func:`lora_kernels.lora_linear`. An output that nobody uses costs its forward pass
    and nothing in the backward pass.

    LoRA is Hu et al., 2021, arXiv 2106.09685; the masks are those of PEFT, one for each projection.

    Args:
        x: the input of all members.
        weights: the base weights, one a member, dense or quantised.
        lora_as: the down-projections.
        lora_bs: the up-projections.
        scalings: s, a number for all or one for each.
        biases: b, with ``None`` where a member has none.
        dropout_p: the probability, for all or for each.
        gates: g, with ``None`` where a member has none.
        training: ``False`` switches dropout off.

    Raises:
        TypeError: an argument is not of the right type or dtype; the message names it and the member.
        ValueError: a length, a shape, a device or a probability does not fit; the message names it.
        BackendError: a backend forced by ``use_backend`` cannot run for these tensors.

    Examples:
        >>> x, weight, a, b = (torch.randn(*shape) for shape in ((2, 8), (4, 8), (2, 8), (4, 2)))
        >>> q, k = lora_linear_group(x, [weight, weight], [a, a], [b, b], scalings=[1.0, 2.0])
    """
    size = _size(weights)
    biases = (None,) * size if biases is None else biases
    gates = (None,) * size if gates is None else gates
    given = dict(zip(_PARTS, (weights, lora_as, lora_bs, biases, gates), strict=True))
    for name, part in given.items():
        _check_length(name, part, size)
    scales, ps = _each("scalings", scalings, size), _each("dropout_p", dropout_p, size)
    for i in range(size):
        _check_member(i, x, [part[i] for part in given.values()], ps[i])
    ps = ps if training else (0.0,) * size
    members = zip(weights, lora_as, lora_bs, biases, gates, scales, ps, strict=True)
    return fused_group(
        [LoraInputs(x, w, a, b, bias, g, None, None, s, p) for w, a, b, bias, g, s, p in members]
    )


def fused_group(members: Sequence[LoraInputs]) -> tuple[Tensor, ...]:
    """:func:`lora_linear_group` for arguments already known to fit: what modules call at every step.

    All members have one x, and none an ``x_lora`` or a seed.
    """
    if len(members) == 1 or _dispatch.transformed():
        return tuple(fused_single(member) for member in members)
    x = members[0].x
    _, *columns, _, _, scalings, dropout_ps = zip(*members, strict=True)
    weights, lora_as, lora_bs, biases, gates = map(list, columns)
    if autocasts(x):
        # Outside the Function, so that autograd casts the gradients back.
        dtype = compute_dtype(x)
        x = x.to(dtype)
        weights, biases = ([cast(t, dtype) for t in part] for part in (weights, biases))
    dense, layouts, packed = _unpack(weights)
    if None not in dense and _dispatch.eager_cpp(x, max(a.shape[0] for a in lora_as)):
        group_in_cpp = torch.ops.lora_kernels.cpp_lora_linear_group_autograd.default
        return tuple(group_in_cpp(x, dense, lora_as, lora_bs, biases, gates, scalings, dropout_ps))
    if packed:  # codes have no dtype, so that x may have any
        biases = [cast(bias, x.dtype) for bias in biases]
    return _LoRALinearGroup.apply(
        *(scalings, dropout_ps, layouts, x),
        *(*dense, *lora_as, *lora_bs, *biases, *gates, *packed),
    )


def _unpack(weights: Sequence[Any]) -> tuple[list[Tensor | None], tuple[Any, ...], list[Tensor | None]]:
    """The dense weights, and of the quantised ones, if any, the sizes and the tensors, kind by kind."""
    quantised = [isinstance(weight, QuantizedWeight) for weight in weights]
    if not any(quantised):
        return list(weights), (None,) * len(weights), []
    pairs = list(zip(weights, quantised, strict=True))
    kinds = zip(*(parts(weight) if is_one else (None,) * 3 for weight, is_one in pairs), strict=True)
    dense = [None if is_one else weight for weight, is_one in pairs]
    layouts = tuple(sizes(weight) if is_one else None for weight, is_one in pairs)
    return dense, layouts, [part for kind in kinds for part in kind]


def _size(weights: Any) -> int:
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights: expected a list or tuple of Tensors, got {type(weights).__name__}")
    if not weights:
        raise ValueError("weights: expected at least one member, got none")
    return len(weights)


def _check_length(name: str, part: Any, size: int) -> None:
    if not isinstance(part, (list, tuple)):
        raise TypeError(f"{name}: expected a list or tuple, got {type(part).__name__}")
    if len(part) != size:
        raise ValueError(f"{name}: expected {size} members, as weights has, got {len(part)}")


def _each(name: str, given: Any, size: int) -> tuple[float, ...]:
    """One number a member."""
    if isinstance(given, (int, float)):
        return (float(given),) * size
    _check_length(name, given, size)
    for i, value in enumerate(given):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name}[{i}]: expected a number, got {type(value).__name__}")
    return tuple(float(value) for value in given)


def _check_member(i: int, x: Tensor, member: list[Any], dropout_p: float) -> None:
    if not isinstance(member[0], (Tensor, QuantizedWeight)):
        raise TypeError(f"weights[{i}]: expected a Tensor, got {type(member[0]).__name__}")
    weight, lora_a, lora_b, bias, gate = member
    try:
        check(LoraInputs(x, weight, lora_a, lora_b, bias, gate, dropout_p=dropout_p))
    except (TypeError, ValueError) as error:
        raise type(error)(f"member {i}: {error}") from None


class _LoRALinearGroup(torch.autograd.Function):
    """Saves x once, h of each and one keep bit an element of each, as far as the asked gradients read it.

    ``tensors``: weights (``None`` where quantised), A, B, b and g of the members, and if any weight is
    quantised, the codes, scales and nested scales; its sizes are in ``layouts``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scalings: tuple[float, ...],
        dropout_ps: tuple[float, ...],
        layouts: tuple[Any, ...],
        x: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        size = len(scalings)
        weights, lora_as, lora_bs, biases, gates, *packed = _split(tensors, size)
        rows = rows_of(x)
        inputs = (rows, weights, lora_as, lora_bs, biases, [gate_rows(g) for g in gates])
        ctx.backend = _dispatch.chosen("lora_linear_group", *inputs)
        seeds = _draw_seeds(x, dropout_ps)
        at_op = GroupInputs(*inputs, seeds, scalings, dropout_ps)
        given = _dispatch.call("lora_linear_group", *at_op, backend=ctx.backend)
        ys, hs, masks = given[:size], given[size : 2 * size], iter(given[2 * size :])
        _add_quantized(ys, [rows] * size, layouts, packed, False)
        masks = [next(masks) if p > 0.0 else None for p in dropout_ps]
        ctx.scalings, ctx.dropout_ps, ctx.layouts = scalings, dropout_ps, layouts
        _save(ctx, x, weights, lora_as, lora_bs, gates, hs, masks, packed)
        ctx.set_materialize_grads(False)
        return tuple(output_like(y, x) for y in ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        used = [i for i, dy in enumerate(dys) if dy is not None]
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needs)
        if not used:
            return tuple(grads)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, dys)
        x, *saved = ctx.saved_tensors
        size = len(dys)
        own = [[part[i] for i in used] for part in _split(saved, size)]
        weights, lora_as, lora_bs, gates, hs, masks, *packed = own
        rows = [rows_of(dys[i]) for i in used]
        places = [(_LEAD + size * kind + i) for i in used for kind in (1, 2, 4)]
        asked = [needs[_LEAD - 1], *(needs[place] for place in places)]
        reads_x = any(needs[_LEAD + size : _LEAD + 2 * size])
        at_op = GroupBackward(
            *(rows, rows_of(x) if reads_x else None, weights, lora_as, lora_bs),
            *(hs, [gate_rows(g) for g in gates], masks),
            *([ctx.scalings[i] for i in used], [ctx.dropout_ps[i] for i in used], asked),
        )
        given = _dispatch.call("lora_linear_group_backward", *at_op, backend=ctx.backend)
        found = iter(given)
        for place, needed in zip((_LEAD - 1, *places), asked, strict=True):
            grads[place] = next(found) if needed else None
        dx = grads[_LEAD - 1]
        if dx is not None:
            _add_quantized([dx] * len(used), rows, [ctx.layouts[i] for i in used], packed, True)
            grads[_LEAD - 1] = dx.view(*dys[used[0]].shape[:-1], dx.shape[1])
        for j, i in enumerate(used):
            gate_at = _LEAD + 4 * size + i
            if grads[gate_at] is not None:
                grads[gate_at] = grads[gate_at].view(gates[j].shape)
            if needs[_LEAD + i]:
                grads[_LEAD + i] = rows[j].T @ rows_of(x)
            if needs[_LEAD + 3 * size + i]:
                grads[_LEAD + 3 * size + i] = rows[j].sum(0)
        return tuple(grads)


def _add_quantized(
    outs: Sequence[Tensor], xs: Sequence[Any], layouts: Sequence[Any], packed: Sequence[Any], transpose: bool
) -> None:
    """Each out += x Wᵀ, or x W, of the members whose weight is quantised; ``packed`` is empty without any."""
    if not packed:
        return
    for out, x, layout, weight in zip(outs, xs, layouts, zip(*packed, strict=True), strict=True):
        if layout is not None:
            accumulate(out, x, weight, layout, transpose)


def _draw_seeds(x: Tensor, dropout_ps: Sequence[float]) -> Tensor | None:
    """One seed for each member that drops, drawn one after the other as single calls would."""
    drawn = [_dispatch.draw_seed(x) for p in dropout_ps if p > 0.0]
    return torch.cat(drawn) if drawn else None


def _split(tensors: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(tensors[i : i + size]) for i in range(0, len(tensors), size)]


def _save(
    ctx: Any,
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    gates: list[Tensor | None],
    hs: Sequence[Tensor],
    masks: list[Tensor | None],
    packed: list[list[Tensor | None]],
) -> None:
    """Of the inputs only what the gradients asked for will read."""
    size, needs = len(weights), ctx.needs_input_grad
    needs_x = needs[_LEAD - 1]
    needs_weight, needs_a, needs_b, _, needs_gate, *_ = _split(needs[_LEAD:], size)
    ctx.save_for_backward(
        x if any(needs_weight) or any(needs_a) else None,
        *(w if needs_x or needs_weight[i] else None for i, w in enumerate(weights)),
        *lora_as,
        *lora_bs,
        *gates,
        *(h if needs_b[i] or needs_gate[i] else None for i, h in enumerate(hs)),
        *(mask if needs_x or needs_a[i] else None for i, mask in enumerate(masks)),
        *(part for kind in packed for part in kind if needs_x),
    )


def _differentiable_backward(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the inputs, for ``create_graph=True``."""
    x, *saved = ctx.saved_tensors
    if x is None:
        raise RuntimeError(
            "lora_linear_group: a double backward needs the input, which is not saved when no first"
            " derivative reads it (frozen lora_as)"
        )
    size, needs = len(dys), ctx.needs_input_grad[_LEAD - 1 :]
    weights, lora_as, lora_bs, gates, _, masks, *packed = _split(saved, size)
    inputs = (x, *weights, *lora_as, *lora_bs, *([None] * size), *gates)
    for i, (layout, *weight) in enumerate(zip(ctx.layouts, *packed, strict=True) if packed else ()):
        if layout is not None:
            weights[i] = _dispatch.call("dequantize", *weight, *layout, x.dtype)
    wanted = [i for i, tensor in enumerate(inputs) if tensor is not None and needs[i]]
    used = [i for i, dy in enumerate(dys) if dy is not None]
    members = zip(weights, lora_as, lora_bs, map(gate_rows, gates), ctx.scalings, ctx.dropout_ps, strict=True)
    linears = [LoraInputs(rows_of(x), w, a, b, None, g, None, None, s, p) for w, a, b, g, s, p in members]
    ys = [composite(linears[i], masks[i]) for i in used]
    rows = [rows_of(dys[i]) for i in used]
    given = torch.autograd.grad(ys, [inputs[i] for i in wanted], rows, create_graph=True, allow_unused=True)
    grads: list[Tensor | None] = [None] * len(needs)
    for i, grad in zip(wanted, given, strict=True):
        grads[i] = grad
    for j, i in enumerate(used):
        if needs[1 + 3 * size + i]:
            grads[1 + 3 * size + i] = rows[j].sum(0)
    return (*(None,) * (_LEAD - 1), *grads)
