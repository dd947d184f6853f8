"""What a method makes of a layer for one forward pass, and the one place that computes a linear with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import LoraInputs
from ..ops._dispatch import direct
from ..ops.adapter_stack import AdapterStack
from ..ops.branched_linear import Branch, branched_linear
from ..ops.dora_linear import fused_dora, output_scale
from ..ops.formed_linear import Former, formed_linear
from ..ops.lora_linear import fused, scaling_as_gate
from ..ops.multi_lora_fusion import multi_lora_fusion
from ..ops.multi_lora_linear import multi_lora_linear
from ..ops.quantized_linear import quantized_linear
from ..quant.weight import QuantizedWeight


class LowRank(NamedTuple):
    """x Wᵀ + s · ((drop(x_lora) Aᵀ) ⊙ g) Bᵀ: the only kind that the fused kernels compute.

    With a magnitude m the weight is m ⊙ (W + s B A) / ‖W + s B A‖ by row (DoRA), and there is no gate.
    """

    # A [r, K], K the width of x_lora; [samples, r, K]: one for each sample along x_lora's first dimension.
    # None: x_lora already is h, and was dropped by the method.
    lora_a: Tensor | None
    # B [N, r], or [samples, N, r].
    lora_b: Tensor
    # s, a number or a tensor of one element.
    scaling: float | Tensor = 1.0
    # g: [r]; [..., r], one for each row; or [..., 1], a scale for each row.
    gate: Tensor | None = None
    # What A multiplies, where it is not x; of any width that A has.
    x_lora: Tensor | None = None
    # m [N].
    magnitude: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is A, B, s and g over x: what groups, multi-adapter ops and pools take."""
        return (
            self.x_lora is None
            and self.magnitude is None
            and self.lora_a is not None
            and self.lora_a.dim() == self.lora_b.dim() == 2
            and (self.gate is None or self.gate.shape[-1] == self.lora_a.shape[0])
        )

    def numbered(self) -> LowRank:
        """The same with a number for s: one that is a tensor goes into the gate, gradient and all."""
        if not isinstance(self.scaling, Tensor):
            return self
        gate = scaling_as_gate(self.scaling, self.gate, self.lora_b)
        return self._replace(scaling=1.0, gate=gate)


class Dense(NamedTuple):
    """x Wᵀ + drop(x) ΔWᵀ: where ΔW [N, K] is of no low rank (HiRA, LoHa, FourierFT of many terms)."""

    delta: Tensor


class Formed(NamedTuple):
    """x W'ᵀ + b: a dense W' made of W and small tensors, which no pass keeps."""

    former: Former
    tensors: Sequence[Tensor]


class Added(NamedTuple):
    """x Wᵀ + y: any differentiable branch, with an op of its own; it drops x itself."""

    y: Tensor


class Branched(NamedTuple):
    """x Wᵀ + branch(x_branch or x): a branch that the product accumulates with, in y and in dX."""

    branch: Branch
    tensors: Sequence[Tensor]
    # What the branch reads, where that is not x: x after dropout.
    x_branch: Tensor | None = None


class Input(NamedTuple):
    """x' Wᵀ + b: the base reads x' in x's place (LoFiT). A quantised W may be below it."""

    x: Tensor


class Scaled(NamedTuple):
    """(x' Wᵀ) ⊙ s + b: the base reads x' in x's place, and its output is scaled (BOFT)."""

    x: Tensor
    # s [N].
    scale: Tensor


class Routed(NamedTuple):
    """x Wᵀ + the experts that each row or sample of x uses: many adapters in one batch."""

    # The experts, each with its scale.
    experts: AdapterStack
    # Which of them: [..., k], or [samples, k]; -1 for none.
    ids: Tensor
    # How much of each, of the same shape.
    weights: Tensor
    # Whether the factors are averaged before they are multiplied, and not what they make of x.
    fusion: bool = False
    # Whether all of y is the same whoever else is in the batch, the base product too.
    batch_invariant: bool = False


class Shifted(NamedTuple):
    """x Wᵀ + b' + what ``update`` adds, b' [N]."""

    update: LowRank | Formed | Added
    shift: Tensor


class Replaced(NamedTuple):
    """x W'ᵀ + b, the rows ``at`` of W' being ``values`` [chosen, K] and all others W's."""

    at: Tensor
    values: Tensor
    # Of an embedding: which of the values each token has, [tokens], -1 for none.
    slots: Tensor


Update = LowRank | Shifted | Replaced | Dense | Formed | Added | Branched | Input | Scaled | Routed


def apply_update(
    x: Tensor, weight: Any, bias: Tensor | None, update: Update, dropout_p: float = 0.0
) -> Tensor:
    """y of a linear with ``update``; with no weight what the update adds alone.

    Args:
        x: ``[..., K]``.
        weight: W ``[N, K]``, dense or quantised, or ``None``.
        bias: b ``[N]``, or ``None``.
        update: what :meth:`Adapter.lower` gave for this x.
        dropout_p: the probability in this call.

    Examples:
        >>> x, weight, a, b = (torch.randn(*shape) for shape in ((2, 8), (4, 8), (2, 8), (4, 2)))
        >>> apply_update(x, weight, None, LowRank(a, b, scaling=2.0)).shape
        torch.Size([2, 4])
    """
    if type(update) is LowRank:
        scaling: Any
        lora_a, lora_b, scaling, gate, x_lora, magnitude = update
        if magnitude is None and gate is None and type(scaling) is float and lora_a is not None:
            # Spelled out, since at small sizes a call more shows.
            y = direct(x, weight, lora_a, lora_b, bias, None, scaling, dropout_p) if x_lora is None else None
            if y is not None:
                return y
            return fused(LoraInputs(x, weight, lora_a, lora_b, bias, None, x_lora, None, scaling, dropout_p))
        return _low_rank(x, weight, bias, update, dropout_p)
    if type(update) is Shifted:
        shift = update.shift.to(x.dtype) if bias is None else bias + update.shift.to(bias.dtype)
        return apply_update(x, weight, shift, update.update, dropout_p)
    if type(update) is Replaced:
        return _replaced(x, weight, bias, update)
    if type(update) is Branched:
        return branched_linear(x, weight, bias, *update)
    if type(update) is Routed:
        return _routed(x, weight, bias, update, dropout_p)
    if type(update) is Dense:
        dropped = F.dropout(x, dropout_p) if dropout_p else x
        if dropped is x and isinstance(weight, Tensor):
            return F.linear(x, weight + update.delta.to(weight.dtype), bias)
        return _plus(_base(x, weight, bias), F.linear(dropped, update.delta.to(x.dtype)))
    if type(update) is Formed:
        if isinstance(weight, QuantizedWeight) or dropout_p:
            y = formed_linear(F.dropout(x, dropout_p), None, None, *update)
            return _plus(_base(x, weight, bias), y)
        return formed_linear(x, weight, bias, *update)
    if isinstance(update, Input | Scaled):
        return _reads_another(weight, bias, update)
    if not isinstance(update, Added):
        raise TypeError(f"lower: expected LowRank, Dense, Branched or Added, got {type(update).__name__}")
    return _plus(_base(x, weight, bias), update.y)


def _reads_another(weight: Any, bias: Tensor | None, update: Input | Scaled) -> Tensor:
    if weight is None:
        raise ValueError("weight: expected one for a method that changes what the base reads, got None")
    y: Any = _base(update.x, weight, bias if isinstance(update, Input) else None)
    if isinstance(update, Input):
        return y  # type: ignore[no-any-return]
    scale = update.scale.to(y.dtype)
    return y * scale if bias is None else torch.addcmul(bias.to(y.dtype), y, scale)


def _replaced(x: Tensor, weight: Any, bias: Tensor | None, update: Replaced) -> Tensor:
    if weight is None:
        raise ValueError("weight: expected one for rows that take the place of its own, got None")
    own = None if bias is None else bias.index_select(0, update.at)
    rows = F.linear(x, update.values.to(x.dtype), own)
    y: Any = _base(x, weight, bias)
    return y.index_copy_(-1, update.at, rows.to(y.dtype))  # type: ignore[no-any-return]


def apply_updates(
    x: Tensor, weight: Any, bias: Tensor | None, updates: Sequence[Any], ps: Sequence[float]
) -> Tensor:
    """y of a linear with several updates, each with the probability of its dropout in this call.

    What has a magnitude (DoRA) scales what those before it gave, as PEFT adds them up; its norms are those of
    W with itself alone. Under its dropout it adds to that instead.

    >>> one = LowRank(torch.randn(2, 8), torch.randn(4, 2))
    >>> apply_updates(torch.randn(3, 8), torch.randn(4, 8), None, [one, one], [0.0, 0.0]).shape
    torch.Size([3, 4])
    """
    if len(updates) == 1 and (isinstance(weight, Tensor) or not _scales(updates[0])):
        return apply_update(x, weight, bias, updates[0], ps[0])
    if any(_scales(one) for one in updates):
        y = _one_after_another(x, weight, updates, ps)
        return y if bias is None else y + bias.to(y.dtype)
    if not any(ps) and all(type(one) is LowRank and one.plain for one in updates):
        return apply_update(x, weight, bias, stack(list(updates)))
    inputs = [one.x - x for one in updates if type(one) is Input]
    if inputs:
        updates, ps = [Input(x + sum(inputs)), *updates], [0.0, *ps]
    y = apply_update(x, weight, bias, updates[0], ps[0])
    for one, p in zip(updates[1:], ps[1:], strict=True):
        y = y if type(one) is Input else y + apply_update(x, None, None, one, p)
    return y


def _scales(update: Any) -> bool:
    return type(update) is LowRank and update.magnitude is not None


def _one_after_another(x: Tensor, weight: Any, updates: Sequence[Any], ps: Sequence[float]) -> Tensor:
    """y without the bias."""
    y = None
    for one, p in zip(updates, ps, strict=True):
        if not _scales(one):
            y = _added(y, x, weight, one, p)
            continue
        direction = one._replace(magnitude=None)
        scale = output_scale(weight, one.lora_a, one.lora_b, one.magnitude, one.scaling)
        if not p:
            y = _added(y, x, weight, direction, 0.0)
            y = scale.to(y.dtype) * y
            continue
        y, d = _base(x, weight, None) if y is None else y, F.dropout(x, p)
        change = (scale - 1).to(y.dtype) * _base(d, weight, None)
        y = y + change + scale.to(y.dtype) * apply_update(d, None, None, direction)
    assert y is not None
    return y


def _added(y: Tensor | None, x: Tensor, weight: Any, update: Update, p: float) -> Tensor:
    """y and what one update adds, with the base product where there is no y yet."""
    y_new = apply_update(x, weight if y is None else None, None, update, p)
    return y_new if y is None else y + y_new


def _routed(x: Tensor, weight: Any, bias: Tensor | None, update: Routed, p: float) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        return _plus(_base(x, weight, bias), _routed(x, None, None, update, p))
    experts, ids, weights, fusion, same = update
    args = (x, weight, experts, ids, weights, bias)
    if fusion:
        return multi_lora_fusion(*args, dropout_p=p, batch_invariant=same)
    ps = [p] * len(experts) if p else None
    return multi_lora_linear(*args, dropout_ps=ps, batch_invariant=same)


def _base(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor | None:
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias)
    return bias if weight is None else F.linear(x, weight, bias)


def _plus(base: Tensor | None, y: Tensor) -> Tensor:
    return y if base is None else base + y.to(base.dtype)


def _low_rank(x: Tensor, weight: Any, bias: Tensor | None, update: LowRank, p: float) -> Tensor:
    scaling: Any
    lora_a, lora_b, scaling, gate, x_lora, magnitude = update.numbered()
    if magnitude is not None:
        return fused_dora(x, weight, lora_a, lora_b, magnitude, bias, scaling, p)
    p = p if lora_a is not None else 0.0
    gate = gate if gate is None or gate.dim() == 1 else gate.expand(*x.shape[:-1], gate.shape[-1])
    return fused(LoraInputs(x, weight, lora_a, lora_b, bias, gate, x_lora, None, scaling, p))


def delta_of(update: Update, eye: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """ΔW [N, K] in ``dtype``; ``eye`` is the x that the update was made for, where that was one.

    Of DoRA's update it is s B A, the change of direction alone.
    """
    if isinstance(update, Dense):
        return update.delta.to(dtype)
    if isinstance(update, Formed):
        return update.former.form(None, *(tensor.to(dtype) for tensor in update.tensors))[0]
    update = update.update if isinstance(update, Shifted) else update
    if isinstance(update, LowRank) and (update.plain or update.magnitude is not None):
        lora_a, lora_b, scaling, gate, _, _ = update
        lora_b = lora_b.to(dtype)
        lora_b = lora_b if gate is None else lora_b * gate.to(dtype)
        return scaling * (lora_b @ lora_a.to(dtype))
    return apply_update(eye, None, None, update).T.to(dtype)


def merge_update(weight: Tensor, base: Tensor, update: Update, eye: Tensor | None = None) -> Tensor:
    """What ``update`` makes of ``weight``, in its dtype; ``base`` is W, whose norms DoRA takes.

    Examples:
        >>> weight, a, b = torch.zeros(4, 8), torch.randn(2, 8), torch.randn(4, 2)
        >>> torch.allclose(merge_update(weight, weight, LowRank(a, b)), b @ a, atol=1e-5)
        True
    """
    total = weight + delta_of(update, eye, weight.dtype)
    if not isinstance(update, LowRank) or update.magnitude is None:
        return total
    low_rank: Any = (update.lora_a, update.lora_b, update.magnitude, update.scaling)
    scale = output_scale(base, *low_rank)
    return scale.to(total.dtype)[:, None] * total


def stack(updates: list[Any]) -> LowRank:
    """Σ_i s_i · (B_i ⊙ g_i) A_i of plain updates: ranks side by side, the scales in the gate.

    Examples:
        >>> one, two = (LowRank(torch.randn(r, 8), torch.randn(4, r)) for r in (2, 3))
        >>> stack([one, two]).lora_a.shape
        torch.Size([5, 8])
    """
    lora_a = torch.cat([f.lora_a for f in updates])
    lora_b = torch.cat([f.lora_b for f in updates], 1)
    same = all(f.gate is None and f.scaling is updates[0].scaling for f in updates)
    if same or (all(f.gate is None for f in updates) and len({_number(f.scaling) for f in updates}) == 1):
        return LowRank(lora_a, lora_b, updates[0].scaling)
    gates = [_scaled_gate(f) for f in updates]
    lead = torch.broadcast_shapes(*(gate.shape[:-1] for gate in gates))
    return LowRank(lora_a, lora_b, 1.0, torch.cat([gate.expand(*lead, -1) for gate in gates], -1))


def _number(scaling: float | Tensor) -> float | int:
    return id(scaling) if isinstance(scaling, Tensor) else scaling


def _scaled_gate(update: LowRank) -> Tensor:
    if update.gate is not None:
        return update.gate * update.scaling
    rank = update.lora_a.shape[:1]
    if isinstance(update.scaling, Tensor):
        return update.scaling.reshape(1).expand(rank)
    return update.lora_a.new_full(rank, update.scaling)
