"""The linear of each of several experts with LoRA, for rows in the order of their experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference.grouped_lora_linear import composite
from . import _dispatch
from ._inputs import autocasts


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """y_t = x_t W_eᵀ + b_e + s · (x_t A_eᵀ) B_eᵀ,  offsets[e] ≤ t < offsets[e + 1]

    LoRA (Hu et al., 2021, arXiv 2106.09685) on the experts of a mixture. No ΔW is formed, and none of W's
    size where W is frozen. On every device the products of each expert run one after another.

    Shapes: x ``[M, K]``, its rows in the order of their experts; weight ``[E, N, K]``, of any strides
    (``w.mT`` of a ``[E, K, N]``); lora_a ``[E, r, K]``, lora_b ``[E, N, r]``, bias ``[E, N]``; offsets
    integers ``[E + 1]`` that begin with 0 and do not fall; y ``[M, N]``, zero from row ``offsets[E]`` on.
    An expert may have no rows.

    Dtypes: x, weight and bias share one floating dtype, y's; the factors may have another. Autocast does
    not change them, as it does not for torch's ``grouped_mm``.

    Raises:
        TypeError: an argument is not a tensor, or of the wrong dtype.
        ValueError: a shape or a device does not fit; the message names it.

    Examples:
        >>> x, weight, a, b = (torch.randn(*shape) for shape in ((5, 8), (2, 4, 8), (2, 3, 8), (2, 4, 3)))
        >>> grouped_lora_linear(x, weight, a, b, offsets=torch.tensor([0, 2, 5])).shape
        torch.Size([5, 4])
    """
    _check(x, weight, lora_a, lora_b, offsets, bias)
    if _dispatch.transformed():
        return composite(x, weight, lora_a, lora_b, bias, offsets, scaling)
    if autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return _GroupedLoRA.apply(x, weight, lora_a, lora_b, bias, offsets, scaling)
    return _GroupedLoRA.apply(x, weight, lora_a, lora_b, bias, offsets, scaling)


def _check(x: Any, weight: Any, lora_a: Any, lora_b: Any, offsets: Any, bias: Any) -> None:
    named = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "offsets": offsets}
    named |= {} if bias is None else {"bias": bias}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (x's), got {value.device}")
        _check_dtype(name, value, x.dtype)
    for name, dims in (("x", 2), ("weight", 3), ("lora_a", 3)):
        if named[name].dim() != dims:
            raise ValueError(f"{name}: expected {dims} dimensions, got {named[name].dim()}")
    experts, out, width = weight.shape
    rank = lora_a.shape[1]
    wanted = {
        "x": (x.shape[0], width),
        "lora_a": (experts, rank, width),
        "lora_b": (experts, out, rank),
        "offsets": (experts + 1,),
        "bias": (experts, out),
    }
    for name, value in named.items():
        if name != "weight" and tuple(value.shape) != wanted[name]:
            raise ValueError(f"{name}: expected shape {wanted[name]}, got {tuple(value.shape)}")


def _check_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if name == "offsets":
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"offsets: expected int32 or int64, got {value.dtype}")
    elif not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    elif name in ("weight", "bias") and value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} (x's), got {value.dtype}")


class _GroupedLoRA(torch.autograd.Function):
    """Saves x where A or W trains, and h where B does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        scaling: float,
    ) -> Tensor:
        args = (x, weight, lora_a, lora_b, bias, offsets, scaling)
        ctx.backend, ctx.scaling = _dispatch.chosen("grouped_lora_linear", *args), scaling
        y, h = _dispatch.call("grouped_lora_linear", *args, backend=ctx.backend)
        needs = ctx.needs_input_grad
        kept = x if needs[1] or needs[2] else None
        ctx.save_for_backward(kept, weight, lora_a, lora_b, h if needs[3] else None, offsets)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:5])
        args = (dy, *ctx.saved_tensors, ctx.scaling, needs)
        found = iter(_dispatch.call("grouped_lora_linear_backward", *args, backend=ctx.backend))
        return *(next(found) if needed else None for needed in needs), None, None
