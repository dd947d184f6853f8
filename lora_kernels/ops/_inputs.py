"""What the arguments of ``lora_linear`` and its relatives have to be, and the dtype they compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant.weight import QuantizedWeight

_TENSORS = ("x", "weight", "lora_a", "lora_b", "bias", "gate", "x_lora")
_OPTIONAL = frozenset({"weight", "bias", "gate", "x_lora"})


def check(
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
