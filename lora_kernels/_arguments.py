"""The arguments of the ops that take many, each list once: named tuples in the order of the schemas.

What is below the public functions hands these on whole. They are flattened where an op, a backend's function
or an autograd Function is called, and :func:`flat` makes the backends' functions of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


class LoraInputs(NamedTuple):
    """Of ``lora_linear``: y = x Wᵀ + b + s · ((drop(x_lora) Aᵀ) ⊙ g) Bᵀ

    At the op x, a gate of more than one dimension, and x_lora are rows.
    """

    # The base's input [..., K], and the branch's where `x_lora` is None.
    x: Tensor
    # W [N, K], or a QuantizedWeight above the op; None for the branch alone.
    weight: Any
    # A [r, K]; above the op also None where x_lora is h, or one for each sample [samples, r, K].
    lora_a: Tensor | None
    # B [N, r]; above the op also [samples, N, r].
    lora_b: Tensor
    # b [N].
    bias: Tensor | None = None
    # g: [r], one for each row [..., r], or above the op a scale for each row [..., 1].
    gate: Tensor | None = None
    # The branch's input where it is another than x, of the width of A.
    x_lora: Tensor | None = None
    # int64 [1]: of the dropout's bits. Above the op None means that it is yet to be drawn.
    seed: Tensor | None = None
    # s.
    scaling: float = 1.0
    # The probability that an element of the branch's input is dropped; zero outside of training.
    dropout_p: float = 0.0

    @property
    def branch(self) -> Tensor:
        """What A multiplies."""
        return self.x if self.x_lora is None else self.x_lora


class LoraBackward(NamedTuple):
    """Of ``lora_linear_backward``: dY, and what of the forward pass the gradients asked for read."""

    dy: Tensor
    # The branch's input, where dA is asked for.
    x: Tensor | None
    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    # drop(x_lora) Aᵀ [M, r], where dB or dg is asked for.
    h: Tensor | None
    gate: Tensor | None
    # The keep bits.
    mask: Tensor | None
    scaling: float
    dropout_p: float
    # Whether the branch has an input of its own, whose gradient then is not x's.
    separate: bool
    # One flag for each of `_ops.GRADS`.
    needs: Sequence[bool]


class DoraInputs(NamedTuple):
    """Of ``dora_linear``: y = x Wᵀ + b + z ⊙ c - drop(x) Wᵀ with z = drop(x) (W + s B A)ᵀ"""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    # c [N]: magnitude over norm.
    scale: Tensor
    bias: Tensor | None = None
    seed: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    # Whether z is returned.
    keep_z: bool = False


class DoraBackward(NamedTuple):
    """Of ``dora_linear_backward``; the fields are those of the two above."""

    dy: Tensor
    x: Tensor | None
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: Tensor
    z: Tensor | None
    h: Tensor | None
    mask: Tensor | None
    scaling: float
    dropout_p: float
    # Of x, lora_a, lora_b and scale.
    needs: Sequence[bool]


class GroupInputs(NamedTuple):
    """Of ``lora_linear_group``: the fields of :class:`LoraInputs` for each member; x is that of all."""

    x: Tensor
    weights: Sequence[Tensor | None]
    lora_as: Sequence[Tensor]
    lora_bs: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    gates: Sequence[Tensor | None]
    # int64, one for each member that drops.
    seeds: Tensor | None
    scalings: Sequence[float]
    dropout_ps: Sequence[float]


class GroupBackward(NamedTuple):
    """Of ``lora_linear_group_backward``: the fields of :class:`LoraBackward` for each member."""

    dys: Sequence[Tensor]
    x: Tensor | None
    weights: Sequence[Tensor | None]
    lora_as: Sequence[Tensor]
    lora_bs: Sequence[Tensor]
    hs: Sequence[Tensor | None]
    gates: Sequence[Tensor | None]
    masks: Sequence[Tensor | None]
    scalings: Sequence[float]
    dropout_ps: Sequence[float]
    # Of x, and then of A, B and g of each member.
    needs: Sequence[bool]


class MultiInputs(NamedTuple):
    """Of ``multi_lora_linear``: rows of different adapters, see ``AdapterStack`` and ``BatchPlan``."""

    x: Tensor
    a_pages: Tensor
    b_pages: Tensor
    pages: Tensor
    spans: Tensor
    # What each slot's branch is multiplied by.
    coef: Tensor
    order: Tensor
    offsets: Tensor
    tiles: Tensor
    # Each slot's keep bits, and 1 / (1 - p).
    mask: Tensor | None
    keep_scale: Tensor | None
    max_rank: int
    # Whether h is returned.
    keep_h: bool


class MultiBackward(NamedTuple):
    """Of ``multi_lora_linear_backward``; the fields are those of the one above."""

    dy: Tensor
    x: Tensor | None
    a_pages: Tensor
    b_pages: Tensor
    pages: Tensor
    spans: Tensor
    coef: Tensor
    order: Tensor
    offsets: Tensor
    tiles: Tensor
    h: Tensor | None
    mask: Tensor | None
    keep_scale: Tensor | None
    max_rank: int
    # Of x, a_pages, b_pages and coef.
    needs: Sequence[bool]


class MultiAdd(NamedTuple):
    """Of ``multi_lora_linear_add``: lists have an entry for each linear that reads x."""

    y: Tensor
    x: Tensor
    a_pages: Sequence[Tensor]
    b_pages: Sequence[Tensor]
    pages: Sequence[Tensor]
    spans: Sequence[Tensor]
    scalings: Sequence[Tensor]
    # One factor a slot.
    weights: Tensor | None
    order: Tensor
    offsets: Tensor
    tiles: Tensor
    table: Tensor | None
    max_rank: int
    batch_invariant: bool


class QuantizedInputs(NamedTuple):
    """Of ``quantized_lora_linear``: :class:`LoraInputs` with W as a ``QuantizedWeight``'s parts."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    nested: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    gate: Tensor | None
    x_lora: Tensor | None
    seed: Tensor | None
    format: str
    block: int
    scaling: float
    dropout_p: float

    @property
    def sizes(self) -> tuple[str, int, int, int]:
        """Format, rows, columns and block of W, as the ops on quantised weights take them."""
        return self.format, self.lora_b.shape[0], self.x.shape[1], self.block

    def over(self, weight: Tensor | None) -> LoraInputs:
        """The same over a dense W."""
        return LoraInputs(self.x, weight, *self[4:10], self.scaling, self.dropout_p)


class DequantizeInputs(NamedTuple):
    """Of ``dequantize``: the parts of a ``QuantizedWeight`` [rows, cols], and the dtype of what is made."""

    codes: Tensor
    scales: Tensor
    nested: Tensor | None
    format: str
    rows: int
    cols: int
    block: int
    dtype: torch.dtype


class QuantizedProduct(NamedTuple):
    """Of ``quantized_linear``: out += x Wᵀ, or x W, of a ``QuantizedWeight``'s parts."""

    out: Tensor
    x: Tensor
    codes: Tensor
    scales: Tensor
    nested: Tensor | None
    format: str
    rows: int
    cols: int
    block: int
    transpose: bool

    @property
    def weight(self) -> Any:
        """The parts of W."""
        return self[2:9]


class GroupedInputs(NamedTuple):
    """Of ``grouped_lora_linear``: rows in order of their expert, those of e from offsets[e] on."""

    x: Tensor
    # [experts, N, K]; A, B and b have experts in front too.
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    offsets: Tensor
    scaling: float


class GroupedBackward(NamedTuple):
    """Of ``grouped_lora_linear_backward``; the fields are those of the one above."""

    dy: Tensor
    x: Tensor | None
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    h: Tensor | None
    offsets: Tensor
    scaling: float
    # Of x, W, A, B and b.
    needs: Sequence[bool]


class StackedInputs(NamedTuple):
    """Of ``stacked_lora_linear``: a server's stacks, one a slice, and which rows are which adapter's."""

    x: Tensor
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    order: Tensor | None
    starts: Tensor
    counts: Tensor
    ids: Tensor
    ranks: Tensor | None
    scalings: Tensor | None
    scaling: float
    # The first column of y that is written.
    offset: int
    # Whether y is added to.
    add: bool
    y: Tensor

    @property
    def segments(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Which rows are which adapter's."""
        return self.order, self.starts, self.counts, self.ids


class GateChainBackward(NamedTuple):
    """Of ``gate_chain_backward``: dY, what was read, and what is filled."""

    dy: Tensor
    x: Tensor
    gates: Sequence[Tensor]
    dims: Sequence[int]
    # The gradient of x where it is asked for, which with `add` is added to.
    dx: Tensor | None
    add: bool
    # The gates', all but those of no elements.
    grads: Sequence[Tensor]


def flat(kind: Callable[..., Any]) -> Callable[[Callable[[Any], _Result]], Callable[..., _Result]]:
    """Decorator: the function of one ``kind`` becomes a function of its fields, in order."""

    def decorate(function: Callable[[Any], _Result]) -> Callable[..., _Result]:
        @functools.wraps(function)
        def call(*args: Any) -> _Result:
            return function(kind(*args))

        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in kind._fields]  # type: ignore[attr-defined]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate
