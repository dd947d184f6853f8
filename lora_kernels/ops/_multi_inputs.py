"""What arguments ``multi_lora_linear`` and its relatives take, and what of them is one a row or a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from .adapter_stack import AdapterStack
from .batch_plan import BatchPlan


def check(
    x: Tensor,
    weight: Tensor | None,
    adapters: AdapterStack,
    ids: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raises what :func:`multi_lora_linear` promises."""
    _dispatch.refuse_transforms("multi_lora_linear")
    if not isinstance(adapters, AdapterStack):
        raise TypeError(f"adapters: expected an AdapterStack, got {type(adapters).__name__}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("weights", weights)):
        _check_tensor(name, tensor, x)
    cols, out = adapters.a_pages.shape[1], adapters.b_pages.shape[1]
    if x.shape[-1:] != (cols,):
        raise ValueError(f"x: expected last dimension {cols} (the adapters'), got shape {tuple(x.shape)}")
    if weight is not None and weight.shape != (out, cols):
        raise ValueError(f"weight: expected shape {(out, cols)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias: expected shape {(out,)}, got {tuple(bias.shape)}")
    _check_ids(x, ids, weights, len(adapters))


def check_target(y: Tensor, x: Tensor, width: int) -> None:
    _check_tensor("y", y, x)
    if y.dtype != x.dtype:
        raise TypeError(f"y: expected {x.dtype} (x's), got {y.dtype}")
    if y.shape != (*x.shape[:-1], width):
        raise ValueError(f"y: expected shape {(*x.shape[:-1], width)}, got {tuple(y.shape)}")


def _check_tensor(name: str, tensor: Any, x: Tensor) -> None:
    if tensor is None and name != "x":
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point() or (name in ("weight", "bias") and tensor.dtype != x.dtype):
        want = "a floating dtype" if name in ("x", "weights") else f"{x.dtype} (x's)"
        raise TypeError(f"{name}: expected {want}, got {tensor.dtype}")


def _check_ids(x: Tensor, ids: Tensor, weights: Tensor | None, count: int) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"adapter_ids: expected a Tensor of integers, got {got}")
    lead = tuple(x.shape[:-1])
    if weights is not None and (weights.shape != ids.shape or tuple(ids.shape[:-1]) not in (lead, lead[:1])):
        want = f"{(*lead, 'k')} or {(*lead[:1], 'k')} for both"
        raise ValueError(f"weights: expected {want}, got {tuple(weights.shape)} and {tuple(ids.shape)}")
    if weights is None and tuple(ids.shape) not in (lead, lead[:1]):
        raise ValueError(f"adapter_ids: expected shape {lead} or {lead[:1]}, got {tuple(ids.shape)}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        largest = int(ids.max())
        if largest >= count:
            raise ValueError(f"adapter_ids: expected below {count}, got {largest}")


def per_row(ids: Tensor, weights: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ids and weights as one a slot, where they were given for each sample."""
    if weights is None:
        return spread_rows(ids, x, 0), None
    return spread_rows(ids, x, 1), spread_rows(weights, x, 1)


def spread_rows(values: Tensor, x: Tensor, after: int) -> Tensor:
    """What is given for each row of x, or for each sample, for each row; ``after`` dimensions follow."""
    lead, own = x.shape[:-1], values.shape[values.dim() - after :]
    if values.shape[: values.dim() - after] == lead:
        return values
    return values.reshape(-1, *(1,) * (len(lead) - 1), *own).expand(*lead, *own)


def slot_ps(dropout_ps: Tensor | Sequence[float], count: int, plan: BatchPlan) -> Tensor | None:
    """Each slot's p of each adapter's, or ``None`` where none drops."""
    ps = torch.as_tensor(dropout_ps, dtype=torch.float32)
    if ps.shape != (count,):
        raise ValueError(
            f"dropout_ps: expected one for each of {count} adapters, got shape {tuple(ps.shape)}"
        )
    if ps.device.type == "cpu" and bool(((ps < 0) | (ps >= 1)).any()):
        raise ValueError(f"dropout_ps: expected 0 <= p < 1, got {ps.tolist()}")
    if ps.device.type == "cpu" and not ps.any():
        return None
    return torch.cat([ps, ps.new_zeros(1)]).to(plan.ids.device)[plan.ids]
