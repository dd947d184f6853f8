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
from ..ops.lora_linear import fused
from ..ops.quantized_linear import quantized_linear
from ..quant.bnb import from_bitsandbytes, why_not_bitsandbytes
from .peft_linear import PeftNamed, dropout_of, inputs_of, stacked, unsupported_now


class _FusedQuantized(PeftNamed):
    """PEFT's LoRA over a quantised weight, which is read where it lies; all else, state included, is PEFT's.

    y = x Wᵀ + b + Σ_i s_i · (drop_i(x) A_iᵀ) B_iᵀ over the active adapters i, in the dtype that
    bitsandbytes computes in, and then of x's. Calls that are not of this form (mixed batches, merged,
    disabled, DoRA, a layer changed since) go to PEFT's own forward.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        names = () if args or kwargs else self._names_now()
        if not names:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        y = grouped(self, x) if len(names) == 1 else None
        return (self._compute(x, names) if y is None else y).to(x.dtype)

    def _names_now(self: Any) -> list[str]:
        """The adapters of a call that is ours, none where it is PEFT's."""
        if self.disable_adapters or self.merged or unsupported_now(self):
            return []
        names = [name for name in self.active_adapters if name in self._modules["lora_A"]._modules]
        ours = not any(name in self.lora_variant for name in names)
        return names if ours and why_not_bitsandbytes(self._modules["base_layer"]) is None else []

    def _compute(self: Any, x: Tensor, names: list[str]) -> Tensor:
        base, dtype = self._modules["base_layer"], self._base_dtype(x)
        weight, bias = from_bitsandbytes(base), base.bias
        if not _shares_dtype(x, dtype):
            # The branch keeps the dtype of x, as PEFT's does, beside a base that is computed in another.
            with torch.autocast(x.device.type, enabled=False):
                bias = None if bias is None else bias.to(dtype)
                y = quantized_linear(x.to(dtype), weight, bias).to(x.dtype)
            return sum((fused(inputs_of(self, name, x)) for name in names), start=y)
        x = x if autocasts(x) else x.to(dtype)
        if len(names) > 1 and not any(dropout_of(self, name) for name in names):
            return fused(stacked(self, names, x, weight, bias))
        y = fused(inputs_of(self, names[0], x, weight, bias))
        return sum((fused(inputs_of(self, name, x)) for name in names[1:]), start=y)

    def group_member(self: Any, x: Tensor) -> LoraInputs | None:
        """What this layer computes for ``x``, where that is one plain fused linear."""
        names, dtype = self._names_now(), self._base_dtype(x)
        if len(names) != 1 or not (_shares_dtype(x, dtype) if autocasts(x) else x.dtype == dtype):
            return None
        base = self._modules["base_layer"]
        return inputs_of(self, names[0], x, from_bitsandbytes(base), base.bias)


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
    for name in layer.active_adapters:
        if name in layer.lora_variant:
            return f"adapter {name!r} uses {type(layer.lora_variant[name]).__name__} over a quantised weight"
    return why_not_bitsandbytes(base) or unsupported_now(layer)
