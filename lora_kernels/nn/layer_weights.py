"""The weight and bias of a layer with adapters: as they are without them, with them, and merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters import Adapter, current_call
from ..adapters.variants import BiasedLoRA
from ..init import GIVEN
from ..init.base import rest_of
from ..ops._inputs import autocasts

# What a layer with adapters holds beside its base's own.
OWN = (
    *("adapters", "active", "merged", "enabled"),
    *("_single", "_unmerged", "_unmerged_bias", "_taker", "_taking", "_other_weight"),
)
_COMPUTED = (
    "weight: expected a parameter of the layer, got one that torch.nn.utils.parametrize, prune or a norm"
    " computes; take that off it, or put it on the adapter's own parameters"
)


class LayerWeights(nn.Module):
    """W and b of a layer with adapters, which is a ``base_type`` itself: mixed into :class:`.AdapterLayer`.

    ``weight`` holds W, W + Σ ΔW_i while merged, or, while an adapter is active whose start took something out
    of W, what that left. Whatever it does not hold now is kept beside it, the same parameter bit for bit.
    """

    base_type: ClassVar[type[nn.Module]]
    weight: Tensor
    bias: Any
    adapters: Any
    active: tuple[str, ...]
    merged: tuple[str, ...]
    enabled: bool
    _unmerged: Tensor | None

    if TYPE_CHECKING:

        def _refresh(self) -> None: ...

    def _start_weights(self) -> None:
        # The adapter whose start took something out of W, and whether `weight` is now what is left.
        self._taker: str | None = None
        self._taking = False
        self.register_buffer("_other_weight", None, persistent=False)
        self.register_buffer("_unmerged", None, persistent=False)
        self.register_buffer("_unmerged_bias", None, persistent=False)

    @property
    def _own_weight(self) -> Any:
        """What ``weight`` is to the layer itself: others may see the adapted one, see :mod:`.exposed`."""
        try:
            return self._parameters["weight"]
        except KeyError:
            raise RuntimeError(_COMPUTED) from None

    @property
    def base_weight(self) -> Tensor:
        """W, also while ``weight`` holds W + Σ ΔW_i."""
        return self._own_weight if self._unmerged is None else self._unmerged

    @property
    def bare_weight(self) -> Tensor:
        """W without any adapter."""
        other = self._buffers["_other_weight"]
        return other if self._taking and other is not None else self.base_weight

    @property
    def bare_bias(self) -> Any:
        """b without any adapter's."""
        unmerged = self._buffers["_unmerged_bias"]
        return self._parameters["bias"] if unmerged is None else unmerged

    def _matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as the [out, in] that adapters change; a view."""
        return weight

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        """Undoes :meth:`_matrix`."""
        return matrix

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + Σ ΔW_i over the active adapters, or what else their methods make of W.

        Computed in at least float32 and rounded once.
        """
        return self._adapted()

    def adapted_weight(self) -> Tensor:
        """The weight that the layer computes with at this moment, differentiable in what its adapters train.

        W + Σ ΔW_i, or what else their methods make of W; W while the adapters are off. Without their dropout.
        For code that takes a weight and not a module: a fused loss on the output head, say.
        """
        if not self.enabled:
            return self.bare_weight
        if self.merged or not self.active:
            return self._own_weight
        if not autocasts(self._own_weight):
            return self._adapted()
        with torch.autocast(self._own_weight.device.type, enabled=False):
            return self._adapted()

    def _adapted(self) -> Tensor:
        weight = self.base_weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = self._matrix(weight.to(wide, copy=True))
        for name in self.active:
            total = self.adapters[name].merged(total, self._matrix(weight))
        return self._unmatrix(total).to(weight.dtype)

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """b + Σ s_i · b_i over the active adapters that have a bias, or ``None`` where none has.

        Raises:
            RuntimeError: the layer has no bias that could take them.
        """
        acting = [self.adapters[name] for name in self.active]
        active = [adapter for adapter in acting if isinstance(adapter, BiasedLoRA)]
        if not active:
            return None
        bias: Tensor | None = self.bare_bias
        if bias is None:
            raise RuntimeError("cannot merge: the adapter has a bias (lora_bias), and the layer has none")
        shifts: list[Any] = [adapter.lower(None, current_call()) for adapter in active]
        return bias + sum(one.shift for one in shifts).to(bias.dtype)

    def merge(self) -> None:
        """Folds the active adapters into ``weight``; a no-op where that is done or nothing is active.

        The base weight is kept beside it: :meth:`unmerge` gives back the same parameter, bit for bit, and
        a weight that is tied to another module is left alone.
        """
        if self.merged or not self.active:
            return
        merged = self.merged_weight()  # raises where a method has no one weight, before anything changes
        bias = self.merged_bias()
        base = self._own_weight
        # Not by attribute: a module files a Parameter as a parameter, also under the name of a buffer.
        self._buffers["_unmerged"] = base
        self.weight = nn.Parameter(merged, requires_grad=False)
        if bias is not None:
            self._buffers["_unmerged_bias"] = self._parameters["bias"]
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.merged = self.active
        self._refresh()

    def unmerge(self) -> None:
        """Undoes :meth:`merge`."""
        if not self.merged:
            return
        base, bias = self.base_weight, self._buffers["_unmerged_bias"]
        self._unmerged = None
        if bias is not None:
            self._buffers["_unmerged_bias"] = None
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        # A move between devices or dtypes while merged leaves a plain tensor in the buffer.
        self.weight = base if isinstance(base, nn.Parameter) else nn.Parameter(base, requires_grad=False)
        self.merged = ()
        self._refresh()

    def _must_be_unmerged(self, what: str) -> None:
        if self.merged:
            raise RuntimeError(
                f"cannot {what} while {', '.join(self.merged)} is merged; call unmerge() first"
            )

    def to_base(self, *, merge: bool = False) -> nn.Module:
        """The layer this was, or with ``merge`` the one it has become."""
        weight: Any = self.merged_weight() if merge else self.bare_weight
        weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        base = self.base_type.__new__(self.base_type)
        state = {key: value for key, value in vars(self).items() if key not in OWN}
        for table in ("_modules", "_buffers"):
            state[table] = {key: value for key, value in state[table].items() if key not in OWN}
        state["_parameters"] = {**self._parameters, "weight": weight, **self._base_bias(merge)}
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - set(OWN)
        base.__dict__.update(state)
        return base

    def _base_bias(self, merge: bool) -> dict[str, nn.Parameter]:
        """The bias of :meth:`to_base`, where it is not the one that stands there."""
        bias = self.merged_bias() if merge else self._buffers["_unmerged_bias"]
        if bias is None:
            return {}
        return {"bias": bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)}

    def _take(self, name: str, adapter: Adapter) -> None:
        """Keeps beside W the weight that the adapter goes on with, which is W's part while it is active."""
        rest = self._unmatrix(adapter.__dict__.pop("rest")).to(self._own_weight.dtype)
        adapter.__dict__["rest"] = None
        self._taker, self._taking = name, False
        self._buffers["_other_weight"] = nn.Parameter(rest.contiguous(), requires_grad=False)
        if _after_load not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_after_load)

    @torch.no_grad()
    def _follow_weight(self) -> None:
        """Makes the weight that does not act follow from a loaded one, where it is of another base."""
        adapter = self.adapters[self._taker]
        if not all(name in adapter._buffers for name in GIVEN) or hasattr(self._own_weight, "full_tensor"):
            return
        start_a, start_b = (adapter._buffers[name] for name in GIVEN)
        scaling = adapter.scaling_at(adapter.r) * (-1 if self._taking else 1)
        weight, other = self._own_weight, self._buffers["_other_weight"]
        want = self._unmatrix(rest_of(self._matrix(weight), start_a, start_b, scaling))
        near = torch.finfo(want.dtype).eps ** 0.5 * max(1.0, float(want.abs().max()))
        if other is None or other.is_meta or not torch.allclose(other, want, 0.0, near):  # else bit for bit
            self._buffers["_other_weight"] = nn.Parameter(want.contiguous(), requires_grad=False)

    @torch.no_grad()
    def take_again(self, adapter: Adapter) -> None:
        """Writes the weight that ``adapter`` goes on with where that of the taker stands."""
        rest = self._unmatrix(adapter.__dict__["rest"])
        place = self._own_weight if self._taking else self._buffers["_other_weight"]
        fill_(place, rest)

    def _settle_weight(self) -> None:
        """Puts W, or what the taker left of it, into ``weight``."""
        if self._taker is None or self._taking == (self._taker in self.active):
            return
        other, self._buffers["_other_weight"] = self._buffers["_other_weight"], self._own_weight
        # A move between devices or dtypes leaves a plain tensor in the buffer.
        self.weight = other if isinstance(other, nn.Parameter) else nn.Parameter(other, requires_grad=False)
        self._taking = not self._taking

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of any module; parameters that are kept among the buffers stay themselves, as others do."""
        kept = {name: one for name, one in self._buffers.items() if isinstance(one, nn.Parameter)}
        super()._apply(fn, recurse)
        for name, parameter in kept.items():
            self._buffers[name] = _moved(parameter, self._buffers[name])
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A state dict always holds the base weight: its adapters come separately."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.base_weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()
        bias = self._buffers["_unmerged_bias"]
        if bias is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What is loaded is a base weight, so a merged layer comes apart first."""
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)


def _after_load(layer: Any, keys: object) -> None:
    if getattr(layer, "_taker", None) is not None:
        layer._follow_weight()


@torch.no_grad()
def fill_(target: Any, value: Tensor) -> None:
    """Copies a whole tensor, into the own part of it where ``target`` is a DTensor."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        places, mesh = target.placements, target.device_mesh
        value = distribute_tensor(value.to(target.device), mesh, places, src_data_rank=None)
    target.copy_(value)


def _moved(parameter: nn.Parameter, moved: Any) -> nn.Parameter:
    """``parameter`` with the numbers of ``moved``, or where torch cannot do that a new one."""
    if moved is parameter:
        return parameter
    if torch._has_compatible_shallow_copy_type(parameter, moved):
        parameter.data = moved.data
        return parameter
    return nn.Parameter(moved, parameter.requires_grad)
