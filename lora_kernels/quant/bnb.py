"""From bitsandbytes' layers and states to :class:`QuantizedWeight`, without importing bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codes import NESTED_BLOCK
from .weight import QuantizedWeight


def from_bitsandbytes(module: Any) -> QuantizedWeight:
    """The weight of a ``Linear4bit`` (NF4) or ``Linear8bitLt``, its codes shared and not copied.

    An int8 layer of bitsandbytes rounds its input to eight bits as well (LLM.int8); computed by this
    package the input stays as it is, which is closer to the dense layer.
    Blocks of a four-bit layer run through the whole weight, as on a card: on a CPU bitsandbytes 0.50 decodes
    a row that is not of whole blocks otherwise than it was encoded.

    Args:
        module: the layer, already quantised (bitsandbytes does that on the move to a device).

    Raises:
        TypeError: neither of the two.
        ValueError: it is not quantised yet, or in a form that has no counterpart here; the message says
            which.

    Examples:
        >>> import bitsandbytes
        >>> layer = bitsandbytes.nn.Linear4bit(64, 8, quant_type="nf4").to("cpu")
        >>> from_bitsandbytes(layer).format
        'nf4'
    """
    reason = why_not_bitsandbytes(module)
    if reason is not None:
        kind = TypeError if _kind(module) is None else ValueError
        raise kind(f"module: {reason}")
    return _from_4bit(module) if _kind(module) == "Linear4bit" else _from_8bit(module)


def why_not_bitsandbytes(module: Any) -> str | None:
    """Why :func:`from_bitsandbytes` does not take ``module``, or ``None``."""
    kind = _kind(module)
    if kind is None:
        return f"expected bitsandbytes' Linear4bit or Linear8bitLt, got {type(module).__name__}"
    if kind == "Linear4bit":
        shape = (module.out_features, module.in_features)
        return _why_not_4bit(getattr(module.weight, "quant_state", None), shape)
    if module.weight.dtype != torch.int8:
        return "the weight of the Linear8bitLt is not quantised (has_fp16_weights, or not moved to a device)"
    if _row_stats(module) is None:
        return "the Linear8bitLt has no SCB"
    return None


def _kind(module: Any) -> str | None:
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("bitsandbytes.")]
    return next((name for name in names if name in ("Linear4bit", "Linear8bitLt")), None)


def _why_not_4bit(state: Any, shape: tuple[int, int]) -> str | None:
    if state is None:
        return "the weight of the Linear4bit is not quantised yet"
    if tuple(state.shape) != shape:
        return f"its weight was quantised as {tuple(state.shape)}, not {shape}"
    if state.quant_type != "nf4":
        return f"quant_type is {state.quant_type!r}, not 'nf4'"
    if getattr(state, "packing_format_for_cpu", False):
        return "the weight of the Linear4bit is packed for bitsandbytes' own CPU kernels"
    if state.nested and (state.state2.blocksize != NESTED_BLOCK or state.state2.code.numel() != 256):
        return f"its scales are quantised in blocks of {state.state2.blocksize}, not {NESTED_BLOCK}"
    return None


def _from_4bit(module: Any) -> QuantizedWeight:
    state = module.weight.quant_state
    nested = None
    if state.nested:
        offset = state.offset.reshape(1)
        nested = torch.cat([part.float() for part in (offset, state.state2.code, state.state2.absmax)])
    codes = module.weight.data.contiguous().view(torch.uint8).reshape(-1)
    scales = state.absmax.reshape(-1)
    return QuantizedWeight.checked(
        *(codes, scales if state.nested else scales.float(), nested, "nf4"),
        *(tuple(state.shape), state.blocksize, state.dtype),
    )


def _row_stats(module: Any) -> Tensor | None:
    stats = getattr(module.weight, "SCB", None)
    return stats if stats is not None else module.state.SCB


def _from_8bit(module: Any) -> QuantizedWeight:
    codes = module.weight.data.contiguous()
    scales = _row_stats(module).detach().float().reshape(-1)
    dtype = torch.float16 if module.bias is None else module.bias.dtype
    return QuantizedWeight.checked(codes, scales, None, "int8", tuple(codes.shape), codes.shape[1], dtype)
