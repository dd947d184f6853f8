"""PEFT's LoRA ``Linear`` with the fused forward, and what its relatives share with it; see :mod:`.peft`."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from .._arguments import LoraInputs
from ..nn.groups import grouped
from ..ops.dora_linear import fused_dora, scaled_dora
from ..ops.lora_linear import fused
from ..ops.low_rank_norm import low_rank_norm
from ..quant import QuantizedWeight

_DROPOUTS = (nn.Identity, nn.Dropout)
_IDENTITY = nn.Identity()


class PeftNamed:
    """Comes before a class of PEFT's: what people print and PEFT's status show goes on under its name."""

    def _get_name(self) -> str:
        # The names of this class and of the one that it extends differ; the latter is PEFT's.
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__.startswith("peft."))


class FusedLoraLinear(PeftNamed, PeftLinear):
    """PEFT's LoRA ``Linear`` with another forward; everything else, state included, is PEFT's.

    y = x Wᵀ + b + Σ_i s_i · (drop_i(x) A_iᵀ) B_iᵀ over the active adapters i; for one adapter with DoRA
    :func:`lora_kernels.dora_linear`. W of a Transformers ``Conv1D`` is a transposed view. Calls that the
    fused ops do not cover (mixed batches, merged, disabled, a layer changed since, several adapters with
    DoRA among them) go to PEFT's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        names = () if args or kwargs else self._names_now(x)
        if not names:
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        y = grouped(self, x) if len(names) == 1 else None
        if y is not None:
            return y
        weight, bias = parameter(base, "weight"), parameter(base, "bias")
        weight = weight.T if self.fan_in_fan_out else weight
        if self.lora_variant and any(name in self.lora_variant for name in names):
            return super().forward(x) if len(names) > 1 else _dora(self, names[0], x, weight, bias)
        if len(names) > 1 and not any(dropout_of(self, name) for name in names):
            return fused(stacked(self, names, x, weight, bias))
        y = fused(inputs_of(self, names[0], x, weight, bias))
        for name in names[1:]:
            y = y + fused(inputs_of(self, name, x))
        return y

    def _names_now(self, x: Tensor) -> list[str]:
        """The adapters of a call that is ours, none where it is PEFT's."""
        if self.disable_adapters or self.merged or unsupported_now(self):
            return []
        names = [name for name in self.active_adapters if name in self._modules["lora_A"]._modules]
        same = x.dtype == parameter(self._modules["base_layer"], "weight").dtype
        return names if same or torch.is_autocast_enabled(x.device.type) else []

    def group_member(self, x: Tensor) -> LoraInputs | None:
        """What this layer computes for ``x``, where that is one plain fused linear."""
        names, base = self._names_now(x), self._modules["base_layer"]
        if len(names) != 1 or self.fan_in_fan_out or names[0] in self.lora_variant:
            return None
        return inputs_of(self, names[0], x, base.weight, base.bias)


def dropout_of(layer: PeftLinear, name: str) -> float:
    """The probability that acts in this call."""
    module = layer._modules["lora_dropout"]._modules[name]
    return module.p if module.training and isinstance(module, nn.Dropout) else 0.0


def parameter(module: Any, name: str) -> Any:
    """``module.<name>`` past the search that a module makes for it: at small sizes each shows."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def _factors(layer: PeftLinear, name: str) -> tuple[Tensor, Tensor]:
    """A and B."""
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    return parameter(lora_a, "weight"), parameter(lora_b, "weight")


def scale_and_gate(scaling: Any, lora_a: Tensor) -> tuple[float, Tensor | None]:
    """s and g of an adapter whose scaling PEFT's hot swapping may have made a tensor: that is g then.

    A number of it would be fixed in what ``torch.compile`` has made.
    """
    if isinstance(scaling, Tensor):
        return 1.0, scaling.to(lora_a.device).expand(lora_a.shape[0])
    return scaling, None


def inputs_of(
    layer: Any,
    name: str,
    x: Tensor,
    weight: Tensor | QuantizedWeight | None = None,
    bias: Tensor | None = None,
) -> LoraInputs:
    """One adapter's call, with the base product where there is a weight."""
    lora_a, lora_b = _factors(layer, name)
    scaling, gate = scale_and_gate(layer.scaling[name], lora_a)
    p = dropout_of(layer, name)
    return LoraInputs(x, weight, lora_a, lora_b, bias, gate, None, None, scaling, p)


def _dora(layer: PeftLinear, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    lora_a, lora_b = _factors(layer, name)
    scaling, gate = scale_and_gate(layer.scaling[name], lora_a)
    lora_b = lora_b if gate is None else lora_b * gate
    module, p = layer.lora_magnitude_vector[name], dropout_of(layer, name)
    if dora.ENABLE_DORA_CACHING and not module.training:
        scale = module.weight / _cached_norm(module, name, weight, lora_a, lora_b, scaling)
        return scaled_dora(x, weight, lora_a, lora_b, scale, bias, scaling, p)
    return fused_dora(x, weight, lora_a, lora_b, magnitude_of(module), bias, scaling, p)


def magnitude_of(module: Any) -> Tensor:
    """m, in a call outside of ``DoraCaching``, which forgets what was kept as PEFT's does."""
    if module._dora_cache:
        module._cache_clear()
    return module.weight


def _cached_norm(module: Any, name: str, weight: Tensor, *low_rank: Any) -> Tensor:
    """‖W + s B A‖ by row from where PEFT's ``DoraCaching`` keeps it."""
    key = f"weight-norm-{name}"
    norm = module._cache_get(key, None)
    if norm is None:
        norm = low_rank_norm(weight.detach(), *low_rank).detach()
        module._cache_store(key, norm)
    return norm


def stacked(
    layer: PeftLinear, names: list[str], x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None
) -> LoraInputs:
    """One call for several adapters: ranks side by side, their scales in the gate."""
    lora_as, lora_bs = zip(*(_factors(layer, name) for name in names), strict=True)
    gates = [_as_gate(layer.scaling[name], lora_a) for name, lora_a in zip(names, lora_as, strict=True)]
    return LoraInputs(x, weight, torch.cat(lora_as), torch.cat(lora_bs, 1), bias, torch.cat(gates))


def _as_gate(scaling: Any, lora_a: Tensor) -> Tensor:
    number, gate = scale_and_gate(scaling, lora_a)
    return lora_a.new_full(lora_a.shape[:1], number) if gate is None else gate.to(lora_a.dtype)


def unsupported_now(layer: PeftLinear) -> str | None:
    """Why no fused call covers the layer as it is now, or ``None``.

    What it asks may change after :func:`accelerate`. A base layer whose forward was replaced is one of
    these: Accelerate's device maps do that.
    """
    modules = layer._modules
    variants = layer.lora_variant
    for name in layer.active_adapters:
        if name in variants and (reason := _why_not_variant(layer, name)):
            return reason
        dropout = modules["lora_dropout"]._modules.get(name, _IDENTITY)
        if type(dropout) not in _DROPOUTS:
            return f"adapter {name!r} has {type(dropout).__name__} for its dropout, not nn.Dropout"
        for part in ("lora_A", "lora_B"):
            module = modules[part]._modules.get(name)
            if module is None:
                continue
            if parameter(module, "bias") is not None:
                return f"adapter {name!r} has lora_bias"
            if hooked(module):
                return f"adapter {name!r} has forward or backward hooks on {part}"
    if "forward" in vars(modules["base_layer"]):
        return "the forward of its base layer was replaced"
    return "its base layer has forward or backward hooks" if hooked(modules["base_layer"]) else None


def _why_not_variant(layer: PeftLinear, name: str) -> str | None:
    """Why a variant is not DoRA, its magnitude beside the weight and without hooks."""
    if type(layer.lora_variant[name]) is not DoraLinearVariant:
        return f"adapter {name!r} uses {type(layer.lora_variant[name]).__name__}"
    module: Any = layer.lora_magnitude_vector[name]
    if hooked(module):
        return f"adapter {name!r} has forward or backward hooks on its magnitude"
    away = module.weight.device != layer.base_layer.weight.device
    return f"the magnitude of adapter {name!r} is on {module.weight.device}" if away else None


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to the module's calls."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_not(layer: PeftLinear) -> str | None:
    """Why a PEFT ``Linear`` stays PEFT's, or ``None``."""
    base: Any = layer.base_layer
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"its base layer is a {type(base).__name__}, not nn.Linear or Transformers' Conv1D"
    if not base.weight.is_floating_point():
        return f"its base weight is {base.weight.dtype}"
    if layer.fan_in_fan_out != is_conv1d(base):
        return f"fan_in_fan_out is {layer.fan_in_fan_out} for a {type(base).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced"
    return unsupported_now(layer)


def is_conv1d(base: nn.Module) -> bool:
    """Whether ``base`` is GPT-2's linear, whose weight is [in, out]."""
    kind = type(base)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
