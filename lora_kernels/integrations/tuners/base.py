"""What the fused layers of PEFT's tuners share: which calls are ours, and how one is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._arguments import LoraInputs
from ...adapters.update import Branched, LowRank, Update, apply_updates
from ...nn.groups import grouped
from ...ops.cored_rank import CoredRank
from ..peft_linear import PeftNamed, hooked_inside, is_conv1d, parameter, why_not_base


class FusedTuner(PeftNamed):
    """Comes before PEFT's class of a linear: y = x Wᵀ + b + what the active adapters add, by our ops.

    A subclass says in :meth:`update` what an adapter comes to, made from the tuner's own tensors so that
    autograd reaches them, and where those are. Everything else, state included, is PEFT's. Calls that are not
    ours (merged, disabled, keyword arguments, hooks inside, another dtype than W's) go to PEFT's own forward.
    """

    # The attribute of PEFT's that has an entry for each adapter of this layer.
    per_adapter: str
    # The attribute that holds its dropouts, or None where the tuner has none.
    dropouts: str | None = None
    # The keyword arguments of a call that its `update` takes.
    reads: frozenset[str] = frozenset()
    # Whether PEFT gives y in the dtype of x, under autocast too; else it is in its base layer's.
    in_dtype_of_x: bool = True

    def update(self, name: str, x: Tensor) -> Update:
        """What adapter ``name`` makes of this layer; ``x`` is for those that read it."""
        raise NotImplementedError(f"{type(self).__name__}: update")

    def why_not_adapter(self, name: str) -> str | None:
        """Why no op of ours covers adapter ``name`` as it is now, or ``None``."""
        return None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        names = [] if args or not kwargs.keys() <= self.reads else _names_now(self, x)
        if not names:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        y = grouped(self, x) if len(names) == 1 else None
        y = self.computed(names, x, kwargs) if y is None else y
        return y.to(x.dtype) if self.in_dtype_of_x else y

    def computed(self, names: list[str], x: Tensor, read: dict[str, Any]) -> Tensor:
        """y with what each adapter adds."""
        updates = [self.update(name, x, **read) for name in names]
        ps = [dropout_now(self, name) for name in names]
        return apply_updates(x, *base_of(self), updates, ps)


class GroupedTuner(FusedTuner):
    """Whose update is a plain LowRank: with its siblings on the same x it is computed in one call.

    That of any other tuner would be made, and drawn, once to find out and once to compute.
    """

    # Whether A is frozen: a group of such layers has no dA to share, and on a CPU takes longer than they do.
    frozen_a: bool = False

    def group_member(self: Any, x: Tensor) -> LoraInputs | None:
        """What this layer computes for ``x``, where that is one plain fused linear."""
        if self.frozen_a and x.device.type == "cpu":
            return None
        names = _names_now(self, x)
        update = self.update(names[0], x) if len(names) == 1 and not is_conv1d(self.base_layer) else None
        if type(update) is not LowRank or not update.plain:
            return None
        lora_a, lora_b, scaling, gate, *_ = update.numbered()
        weight, bias = base_of(self)
        p = dropout_now(self, names[0])
        return LoraInputs(x, weight, lora_a, lora_b, bias, gate, None, None, scaling, p)  # type: ignore[arg-type]


class Takeover(NamedTuple):
    """What takes over a class of PEFT's."""

    fused: type[Any]
    # Why a layer of that class stays PEFT's, or None.
    why_not: Callable[[Any], str | None]


def linear(fused: type[Any]) -> Takeover:
    """The takeover of a linear by a :class:`FusedTuner`."""
    return Takeover(fused, lambda layer: _why_not(layer, fused))


def _why_not(layer: Any, fused: type[FusedTuner]) -> str | None:
    if layer.get_base_layer() is not layer.base_layer:
        return "it wraps another tuner's layer"
    return why_not_base(layer) or why_not_now(layer, fused)


def why_not_now(layer: Any, fused: type[Any]) -> str | None:
    """Why no call is ours as the layer is now, or ``None``; what it asks may change after ``accelerate``."""
    for name in layer.active_adapters:
        if name not in getattr(layer, fused.per_adapter):
            continue
        if fused.dropouts is not None:
            dropout = getattr(layer, fused.dropouts)[name]
            if type(dropout) not in (nn.Identity, nn.Dropout):
                return f"adapter {name!r} has {type(dropout).__name__} for its dropout, not nn.Dropout"
        reason = fused.why_not_adapter(layer, name)
        if reason is not None:
            return reason
    if "forward" in vars(layer._modules["base_layer"]):
        return "the forward of its base layer was replaced"
    return "it has forward or backward hooks inside" if hooked_inside(layer) else None


def names_now(layer: Any) -> list[str]:
    """The adapters of a call that is ours, none where it is PEFT's."""
    if layer.disable_adapters or layer.merged or why_not_now(layer, type(layer)):
        return []
    held = getattr(layer, layer.per_adapter)
    return [name for name in layer.active_adapters if name in held]


def _names_now(layer: Any, x: Tensor) -> list[str]:
    """The same where x is of the dtype that W is."""
    same = x.dtype == parameter(layer._modules["base_layer"], "weight").dtype
    return names_now(layer) if same or torch.is_autocast_enabled(x.device.type) else []


def base_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """W [N, K] and b."""
    base = layer._modules["base_layer"]
    weight = parameter(base, "weight")
    return weight.T if is_conv1d(base) else weight, parameter(base, "bias")


def dropout_now(layer: Any, name: str) -> float:
    """The probability that acts in this call."""
    if layer.dropouts is None:
        return 0.0
    module = getattr(layer, layer.dropouts)[name]
    return module.p if module.training and isinstance(module, nn.Dropout) else 0.0


def cored(lora_a: Tensor, core: Tensor, lora_b: Tensor, scaling: float, p: float) -> LowRank | Branched:
    """s · drop(x) Aᵀ Cᵀ Bᵀ of frozen A and B; where it drops, C goes into B, so that our kernels draw."""
    if p:
        return LowRank(lora_a, lora_b @ core, scaling)
    return Branched(CoredRank(lora_b.shape[0], scaling), (lora_a, core, lora_b))


def dropped(layer: Any, name: str, x: Tensor) -> Tensor | None:
    """x after dropout for an update that reads it itself, or ``None`` where nothing is dropped."""
    p = dropout_now(layer, name)
    return F.dropout(x, p) if p else None
