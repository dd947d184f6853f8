"""What the arguments of ``lora_linear`` and its relatives have to be, and the dtype they compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arguments import LoraInputs
from ..quant.weight import QuantizedWeight

_TENSORS = ("x", "weight", "lora_a", "lora_b", "bias", "gate", "x_lora")
_OPTIONAL = frozenset({"weight", "bias", "gate", "x_lora"})


def check(inputs: LoraInputs, *, forms: bool = False) -> None:
    """Raises what :func:`lora_linear` promises. The usual call passes with a few comparisons.

    ``forms``: whether there may be no A, and factors for each sample.
    """
    x, weight, lora_a, lora_b, bias, gate, x_lora, _, _, dropout_p = inputs
    tensors = (x, weight, lora_a, lora_b, bias, gate, x_lora)
    _check_types(tensors, dropout_p, forms and x_lora is not None)
    _check_dims("lora_a", lora_a, x, forms)
    _check_dims("lora_b", lora_b, x, forms and (lora_a is None or lora_a.dim() == 3))
    rows_out, rank = lora_b.shape[-2:]
    cols = rank if lora_a is None else lora_a.shape[-1]
    if lora_a is not None:
        want = (*lora_b.shape[:-1], lora_a.shape[-2])
        _check_shape("lora_b", lora_b, want, lora_b.shape, "[out features, rank of lora_a]")
    width = cols if x_lora is None else weight.shape[-1] if weight is not None else x.shape[-1:].numel()
    _check_shape("x", x, (width,), x.shape[-1:], "its last dimension, by lora_a,")
    if weight is not None:
        _check_shape("weight", weight, (rows_out, width), weight.shape, "[lora_b rows, x columns]")
    if bias is not None:
        _check_shape("bias", bias, (rows_out,), bias.shape, "[lora_b rows]")
    if x_lora is not None:
        want = (*x.shape[:-1], cols)
        _check_shape("x_lora", x_lora, want, x_lora.shape, "x's rows and [lora_a columns, or rank without]")
    if gate is not None and gate.shape != (rank,) and gate.shape != (*x.shape[:-1], 1):
        words = "[rank] or x's rows and [rank] or [1]"
        _check_shape("gate", gate, (*x.shape[:-1], rank), gate.shape, words)
    if not 0.0 <= dropout_p < 1.0 or (dropout_p and lora_a is None):
        bound = "0 without lora_a" if lora_a is None else "0 <= dropout_p < 1"
        raise ValueError(f"dropout_p: expected {bound}, got {dropout_p}")
    _check_dtypes(x, weight, lora_a, lora_b, bias, gate, x_lora)


def _check_dims(name: str, factor: Tensor | None, x: Tensor, by_sample: bool) -> None:
    """A factor is a matrix, or where that may be one for each sample of x."""
    if factor is None or factor.dim() == 2:
        return
    if not by_sample or factor.dim() != 3:
        raise ValueError(f"{name}: expected {'2 or 3' if by_sample else 2} dimensions, got {factor.dim()}")
    if x.dim() < 2 or factor.shape[0] != x.shape[0]:
        words = f"one for each of {x.shape[0] if x.dim() > 1 else 0} samples"
        raise ValueError(f"{name}: expected {words}, got shape {tuple(factor.shape)}")


def _check_types(tensors: tuple[Any, ...], dropout_p: Any, without_a: bool) -> None:
    for name, value in zip(_TENSORS, tensors, strict=True):
        if name == "weight" and isinstance(value, QuantizedWeight):
            continue
        absent = value is None and (name in _OPTIONAL or (without_a and name == "lora_a"))
        if not isinstance(value, Tensor) and not absent:
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
        if other.dtype != x.dtype and (not other.is_floating_point() or (same and not autocasts(x))):
            want = f"{x.dtype} (x's)" if same else "a floating dtype"
            raise TypeError(f"{name}: expected {want}, got {other.dtype}")


def autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # meta has no autocast, and asking raises


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``F.linear`` would compute in."""
    if autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor.to(dtype) if isinstance(tensor, Tensor) else tensor
