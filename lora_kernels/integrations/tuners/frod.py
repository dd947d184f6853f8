"""FRoD (2026, doi 10.1609/aaai.v40i31.39813): W in two bases of its own, with a sparse matrix between."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.frod.layer import Linear
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...ops.sparse_core import Places, places, sparse_core
from .base import FusedTuner, base_of, dropout_now, dropped, linear


class _Core(NamedTuple):
    """What takes the place of W."""

    # V [in, n], U [out, n], λ [n], S's values and where they are.
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    where: Places
    # x after dropout, where it drops.
    x: Tensor | None


class FusedFrod(FusedTuner, Linear):  # type: ignore[misc]
    """y = x V (diag λ + S)ᵀ Uᵀ + b; where it drops, or of several adapters, each is drop(x) times that - W

    PEFT sorts S's places at each call, and makes a dense matrix of S's gradient.
    """

    per_adapter = "frod_lambda_l"
    dropouts = "frod_dropout"

    def why_not_adapter(self: Any, name: str) -> str | None:
        """W that waits elsewhere is PEFT's to fetch."""
        offloads = self.runtime_offload_base_weight.get(name)
        return f"adapter {name!r} has runtime_offload_base_weight" if offloads else None

    def update(self: Any, name: str, x: Tensor) -> _Core:  # type: ignore[override]
        """Of PEFT's tensors, which are on the CPU until a call."""
        right, left = (held[name].to(x.device) for held in (self.frod_V, self.frod_U))
        where = Places(*(one.to(x.device) for one in _places(self.frod_s_indices[name], right.shape[1])))
        tensors = (right, left, self.frod_lambda_l[name], self.frod_lambda_s_values[name])
        return _Core(tensors, where, dropped(self, name, x))

    def computed(self: Any, names: list[str], x: Tensor, read: dict[str, Any]) -> Tensor:
        """W times x less what the adapters read, which of one that drops nothing is nothing."""
        weight, bias = base_of(self)
        cores: list[_Core] = [self.update(name, x) for name in names]
        inputs = [x if core.x is None else core.x for core in cores]
        parts = [
            sparse_core(given, *core.tensors, core.where) for given, core in zip(inputs, cores, strict=True)
        ]
        y = functools.reduce(torch.add, parts)
        if len(names) == 1 and not dropout_now(self, names[0]):
            return y if bias is None else y + bias.to(y.dtype)
        return F.linear(functools.reduce(torch.sub, inputs, x), weight, bias) + y


# Of the places of a tensor, those in order, while its numbers are the same.
_KEPT: Any = WeakIdKeyDictionary()


def _places(indices: Tensor, size: int) -> Places:
    version = 0 if indices.is_inference() else indices._version
    kept = _KEPT.get(indices)
    if kept is None or kept[0] != version:
        kept = _KEPT[indices] = (version, places(indices, size))
    return kept[1]  # type: ignore[no-any-return]


TAKEOVERS = {Linear: linear(FusedFrod)}
