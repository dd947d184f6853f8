"""PEFT's LoRA over bitsandbytes' layers with the fused forward; see :mod:`.peft`.

Imports bitsandbytes, so that :mod:`.peft` imports it where PEFT has done that already.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from .._arguments import LoraInputs
from ..nn.groups import grouped
from ..ops._inputs import autocasts, compute_dtype
from ..ops.quantized_linear import quantized_linear
from ..quant.bnb import from_bitsandbytes, why_not_bitsandbytes
from .peft_linear import PeftNamed, combined, inputs_of, is_dora, names_now, plain_name_now, unsupported_now


class _FusedQuantized(PeftNamed):
    """PEFT's LoRA over a quantised weight, which is read where it lies; all else, state included, is PEFT's.

    y = x Wᵀ + b + Σ_i s_i · (drop_i(x) A_iᵀ) B_iᵀ over the active adapters i, in the dtype that
    bitsandbytes computes in, and then of x's; DoRA, aLoRA, Arrow and mixed batches as over a dense weight.
    Calls that are not of this form (merged, disabled, a layer changed since) go to PEFT's own forward.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        names = [] if args or self._why_not_base() else names_now(self, x, kwargs)
        if not names:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        y = grouped(self, x) if len(names) == 1 and not kwargs else None
        return (self._compute(x, names, kwargs) if y is None else y).to(x.dtype)

    def _why_not_base(self: Any) -> str | None:
        return why_not_bitsandbytes(self._modules["base_layer"])

    def _compute(self: Any, x: Tensor, names: list[str], told: dict[str, Any]) -> Tensor:
        base, dtype = self._modules["base_layer"], self._base_dtype(x)
        weight, bias = from_bitsandbytes(base), base.bias
        if _shares_dtype(x, dtype) or any(is_dora(self, name) for name in names):
            x = x if autocasts(x) else x.to(dtype)
            return combined(self, names, x, weight, bias, told)
        # The branch keeps the dtype of x, as PEFT's does, beside a base that is computed in another.
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            y = quantized_linear(x.to(dtype), weight, bias).to(x.dtype)
        return y + combined(self, names, x, None, None, told)

    def group_member(self: Any, x: Tensor) -> LoraInputs | None:
        """What this layer computes for ``x``, where that is one plain fused linear."""
        dtype = self._base_dtype(x)
        ours = _shares_dtype(x, dtype) if autocasts(x) else x.dtype == dtype
        name = plain_name_now(self, x) if ours and self._why_not_base() is None else None
        base = self._modules["base_layer"]
        return None if name is None else inputs_of(self, name, x, from_bitsandbytes(base), base.bias)


class FusedLoraLinear4bit(_FusedQuantized, Linear4bit):
    __doc__ = _FusedQuantized.__doc__

    def _base_dtype(self, x: Tensor) -> torch.dtype:
        """What bitsandbytes casts x to; a layer that was not told finds out at its first call."""
        base: Any = self._modules["base_layer"]
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        return base.compute_dtype or x.dtype


class FusedLoraLinear8bitLt(_FusedQuantized, Linear8bitLt):
    """As over four bits. bitsandbytes rounds x to eight bits here, except on a CPU in training; this does
    not, and comes closer to the dense layer.
    """

    def _base_dtype(self, x: Tensor) -> torch.dtype:
        return compute_dtype(x)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    Linear4bit: FusedLoraLinear4bit,
    Linear8bitLt: FusedLoraLinear8bitLt,
}
_BASES = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)


def _shares_dtype(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether base and branch are both computed in ``dtype``, no less exactly than PEFT does it."""
    if autocasts(x):
        return compute_dtype(x) == dtype
    return torch.promote_types(x.dtype, dtype) == dtype


def why_not(layer: Any) -> str | None:
    """Why a layer of :data:`FUSED` stays PEFT's, or ``None``."""
    base = layer.base_layer
    if type(base).forward not in [kind.forward for kind in _BASES]:
        return f"its base layer is a {type(base).__name__} with a forward that is not bitsandbytes'"
    if "forward" in vars(layer):
        return "its forward was replaced"
    return why_not_bitsandbytes(base) or unsupported_now(layer, layer.active_adapters)
