"""Inputs for the ops: a case says what, :func:`lora_inputs` makes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# The tensor arguments of `lora_linear` that can take a gradient.
TENSORS = ("x", "weight", "lora_a", "lora_b", "bias", "gate", "x_lora")

Inputs = dict[str, Tensor | None]


@dataclass(frozen=True)
class LoraCase:
    """One call of ``lora_linear``: shapes, dtypes, layouts and options.

    ``weight`` is ``dense``, ``transposed`` (a view of a [K, N] matrix) or ``none``; ``gate`` is
    ``none``, ``rank``, ``rows`` or ``scale`` (one number a row); ``branch_cols`` is the width of an
    x_lora of its own; ``x_layout`` is ``dense``, ``strided`` (rows apart from each
    other), ``columns`` (every second column) or ``transposed``; ``factors`` is ``dense``, ``views``
    (the first ranks of wider factors), ``transposed``, ``none`` (no A: x_lora is h), ``samples`` (one A
    and one B for each of the first dimension's) or ``sample a``.
    """

    lead: tuple[int, ...] = (7,)
    cols: int = 24
    out: int = 20
    rank: int = 4
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    weight: str = "dense"
    bias: bool = False
    gate: str = "none"
    x_lora: bool = False
    x_layout: str = "dense"
    factors: str = "dense"
    scaling: float = 0.75
    dropout_p: float = 0.0
    branch_cols: int | None = None

    @property
    def width(self) -> int:
        """The number of columns that the branch reads."""
        return self.branch_cols or self.cols

    @property
    def rows(self) -> int:
        """The number of rows x has as a matrix."""
        return int(torch.Size(self.lead).numel())

    def present(self) -> tuple[str, ...]:
        """The names in ``TENSORS`` that this case has."""
        absent = {
            "weight": self.weight == "none",
            "bias": not self.bias,
            "gate": self.gate == "none",
            "x_lora": not self.x_lora and self.branch_cols is None and self.factors != "none",
            "lora_a": self.factors == "none",
        }
        return tuple(name for name in TENSORS if not absent.get(name, False))


class _Maker:
    """Normal numbers drawn in fp64 on the CPU, so that every dtype and device gets the same ones."""

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, dtype=torch.float64, generator=self.generator) * scale
        return values.to(dtype).to(self.device)


def _activation(make: _Maker, case: LoraCase) -> Tensor:
    lead, cols, dtype = case.lead, case.cols, case.dtype
    if case.x_layout == "strided":
        return make((*lead, cols + 3), dtype)[..., :cols]
    if case.x_layout == "columns":
        return make((*lead, 2 * cols), dtype)[..., ::2]
    if case.x_layout == "transposed":
        return make((cols, *lead[::-1]), dtype).permute(*range(len(lead), -1, -1))
    return make((*lead, cols), dtype)


def _factors(make: _Maker, case: LoraCase) -> tuple[Tensor | None, Tensor]:
    rank, cols, out = case.rank, case.width, case.out
    dtype = case.adapter_dtype or case.dtype
    scale_a, scale_b = cols**-0.5, max(rank, 1) ** -0.5
    if case.factors == "views":
        wide = rank + 3
        return make((wide, cols), dtype, scale_a)[:rank], make((out, wide), dtype, scale_b)[:, :rank]
    if case.factors == "transposed":
        return make((cols, rank), dtype, scale_a).T, make((rank, out), dtype, scale_b).T
    each = case.lead[:1]
    lead_a = each if case.factors.startswith("sample") else ()
    lead_b = each if case.factors == "samples" else ()
    lora_a = None if case.factors == "none" else make((*lead_a, rank, cols), dtype, scale_a)
    return lora_a, make((*lead_b, out, rank), dtype, scale_b)


def _weight(make: _Maker, case: LoraCase) -> Tensor | None:
    scale = case.cols**-0.5
    if case.weight == "none":
        return None
    if case.weight == "transposed":
        return make((case.cols, case.out), case.dtype, scale).T
    return make((case.out, case.cols), case.dtype, scale)


def lora_inputs(case: LoraCase, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """The tensors of ``case``, scaled so that every product of them is of order one.

    Examples:
        >>> inputs = lora_inputs(LoraCase())
    """
    make = _Maker(seed, device)
    lora_a, lora_b = _factors(make, case)
    shapes = {"rank": (case.rank,), "rows": (*case.lead, case.rank), "scale": (*case.lead, 1)}
    gate_shape, there = shapes.get(case.gate), "x_lora" in case.present()
    width = case.rank if case.factors == "none" else case.width
    return {
        "x": _activation(make, case),
        "weight": _weight(make, case),
        "lora_a": lora_a,
        "lora_b": lora_b,
        "bias": make((case.out,), case.dtype) if case.bias else None,
        "gate": None if gate_shape is None else make(gate_shape, lora_b.dtype),
        "x_lora": make((*case.lead, width), case.dtype) if there else None,
    }


def leaves(inputs: Inputs, requires_grad: Iterable[str] = (), dtype: torch.dtype | None = None) -> Inputs:
    """Leaf tensors with the same values and strides, those named requiring grad.

    Examples:
        >>> leaves({"x": torch.ones(2)}, requires_grad=["x"])["x"].requires_grad
        True
    """
    wanted = set(requires_grad)
    made: Inputs = {}
    for name, tensor in inputs.items():
        leaf = None if tensor is None else tensor.detach().to(dtype or tensor.dtype)
        made[name] = leaf if leaf is None else leaf.requires_grad_(name in wanted)
    return made
