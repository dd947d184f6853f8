"""Convolutions of LoHa, LoKr and HiRA: one, of W + ΔW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.hira import layer as hira
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from torch import Tensor, nn

from ..peft_linear import PeftNamed
from .base import Takeover, dropout_now, names_now, why_not_now

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _FusedConv(PeftNamed):
    """y = x ∗ (W + ΔW) + b by PEFT's ΔW, where PEFT convolves with each of the two."""

    per_adapter: str
    dropouts: str | None = None
    # Whether PEFT gives y in the dtype of x, under autocast too; else it is in its base layer's.
    in_dtype_of_x: bool = True

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        base = self.base_layer
        same = x.dtype == base.weight.dtype or torch.is_autocast_enabled(x.device.type)
        names = [] if args or kwargs or not same else names_now(self)
        if not names or any(dropout_now(self, name) for name in names):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        y: Tensor = base._conv_forward(x, _changed(base.weight, map(self.change, names)), base.bias)
        return y.to(x.dtype) if self.in_dtype_of_x else y


def _changed(weight: Tensor, changes: Iterable[Tensor]) -> Tensor:
    """W + ΔW, rounded once."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for change in changes:
        total = total + change.to(total.dtype)
    return total.to(weight.dtype)


class _FusedLycorisConv(_FusedConv):
    per_adapter = "scaling"

    def why_not_adapter(self: Any, name: str) -> str | None:
        """Module dropout leaves out the adapter."""
        return f"adapter {name!r} has module_dropout" if self.module_dropout[name] else None

    def change(self: Any, name: str) -> Tensor:
        """ΔW, after PEFT's dropout of its rows."""
        if self.training:
            torch.rand(1)  # PEFT's draw for module dropout
        drops = self.training and bool(self.rank_dropout[name])
        return self.get_delta_weight(name, apply_rank_dropout=drops)  # type: ignore[no-any-return]


class _FusedHiraConv(_FusedConv):
    """Dropped, x differs between the two: PEFT's."""

    per_adapter = "hira_A"
    dropouts = "hira_dropout"
    in_dtype_of_x = False

    def why_not_adapter(self: Any, name: str) -> str | None:
        """Nothing of its own."""
        return None

    def change(self: Any, name: str) -> Tensor:
        """W ⊙ (B A)."""
        return self.base_layer.weight * self.get_delta_weight(name)  # type: ignore[no-any-return]


class FusedLohaConv1d(_FusedLycorisConv, loha.Conv1d):
    __doc__ = _FusedConv.__doc__


class FusedLohaConv2d(_FusedLycorisConv, loha.Conv2d):
    __doc__ = _FusedConv.__doc__


class FusedLokrConv1d(_FusedLycorisConv, lokr.Conv1d):
    __doc__ = _FusedConv.__doc__


class FusedLokrConv2d(_FusedLycorisConv, lokr.Conv2d):
    __doc__ = _FusedConv.__doc__


class FusedHiraConv1d(_FusedHiraConv, hira.Conv1d):
    __doc__ = _FusedConv.__doc__


class FusedHiraConv2d(_FusedHiraConv, hira.Conv2d):
    __doc__ = _FusedConv.__doc__


class FusedHiraConv3d(_FusedHiraConv, hira.Conv3d):
    __doc__ = _FusedConv.__doc__


def _takeover(fused: type[Any]) -> Takeover:
    return Takeover(fused, lambda layer: _why_not(layer, fused))


def _why_not(layer: Any, fused: type[Any]) -> str | None:
    base = layer.base_layer
    if layer.get_base_layer() is not base:
        return "it wraps another tuner's layer"
    if type(base) not in _PLAIN or "forward" in vars(layer):
        return f"its base layer is a {type(base).__name__}, not a plain one of torch's"
    if base.padding_mode != "zeros":
        return "its convolution has a padding mode"
    return why_not_now(layer, fused)


TAKEOVERS = {
    loha.Conv1d: _takeover(FusedLohaConv1d),
    loha.Conv2d: _takeover(FusedLohaConv2d),
    lokr.Conv1d: _takeover(FusedLokrConv1d),
    lokr.Conv2d: _takeover(FusedLokrConv2d),
    hira.Conv1d: _takeover(FusedHiraConv1d),
    hira.Conv2d: _takeover(FusedHiraConv2d),
    hira.Conv3d: _takeover(FusedHiraConv3d),
}
