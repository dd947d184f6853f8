"""PEFT's LoRA ``Linear`` with the fused forward, and what its relatives share with it; see :mod:`.peft`."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..nn.groups import Member, grouped
from ..ops.dora_linear import fused_dora
from ..ops.lora_linear import fused
from ..quant import QuantizedWeight

_DROPOUTS = (nn.Identity, nn.Dropout)
_IDENTITY = nn.Identity()


class FusedLoraLinear(PeftLinear):
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
        weight = base.weight.T if self.fan_in_fan_out else base.weight
        if self.lora_variant and any(name in self.lora_variant for name in names):
            return super().forward(x) if len(names) > 1 else _dora(self, names[0], x, weight, base.bias)
        if len(names) > 1 and not any(dropout_of(self, name) for name in names):
            return fused(x, weight, *stacked(self, names, base.bias))
        y = branch(self, names[0], x, weight, base.bias)
        for name in names[1:]:
            y = y + branch(self, name, x, None, None)
        return y

    def _names_now(self, x: Tensor) -> list[str]:
        """The adapters of a call that is ours, none where it is PEFT's."""
        if self.disable_adapters or self.merged or unsupported_now(self):
            return []
        names = [name for name in self.active_adapters if name in self._modules["lora_A"]._modules]
        same = x.dtype == self._modules["base_layer"].weight.dtype
        return names if same or torch.is_autocast_enabled(x.device.type) else []

    def group_member(self, x: Tensor) -> Member | None:
        """What this layer computes for ``x``, where that is one plain fused linear."""
        names, base = self._names_now(x), self._modules["base_layer"]
        if len(names) != 1 or self.fan_in_fan_out or names[0] in self.lora_variant:
            return None
        (name,) = names
        lora_a, lora_b = (self._modules[part]._modules[name].weight for part in ("lora_A", "lora_B"))
        return Member(
            base.weight, lora_a, lora_b, base.bias, None, self.scaling[name], dropout_of(self, name)
        )


def dropout_of(layer: PeftLinear, name: str) -> float:
    """The probability that acts in this call."""
    module = layer._modules["lora_dropout"]._modules[name]
    return module.p if module.training and isinstance(module, nn.Dropout) else 0.0


def branch(
    layer: PeftLinear, name: str, x: Tensor, weight: Tensor | QuantizedWeight | None, bias: Tensor | None
) -> Tensor:
    """One adapter's call, with the base product where there is a weight."""
    lora_a = layer._modules["lora_A"]._modules[name].weight
    lora_b = layer._modules["lora_B"]._modules[name].weight
    return fused(x, weight, lora_a, lora_b, bias, None, None, layer.scaling[name], dropout_of(layer, name))


def _dora(layer: PeftLinear, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    magnitude = layer.lora_magnitude_vector[name].weight
    return fused_dora(
        x, weight, lora_a, lora_b, magnitude, bias, layer.scaling[name], dropout_of(layer, name)
    )


def stacked(layer: PeftLinear, names: list[str], bias: Tensor | None) -> tuple[Any, ...]:
    """The arguments of one call for several adapters: ranks side by side, their scales in the gate."""
    lora_a = torch.cat([layer.lora_A[name].weight for name in names])
    lora_b = torch.cat([layer.lora_B[name].weight for name in names], 1)
    gates = [lora_a.new_full((layer.lora_A[name].weight.shape[0],), layer.scaling[name]) for name in names]
    return lora_a, lora_b, bias, torch.cat(gates), None, 1.0, 0.0


def unsupported_now(layer: PeftLinear) -> bool:
    """What may change after :func:`accelerate`: a variant of an active adapter, hooks on inner modules.

    A base layer whose forward was replaced is one of these: Accelerate's device maps do that.
    """
    modules = layer._modules
    variants = layer.lora_variant
    for name in layer.active_adapters:
        if name in variants and not _plain_dora(layer, name):
            return True
        if type(modules["lora_dropout"]._modules.get(name, _IDENTITY)) not in _DROPOUTS:
            return True
        for part in ("lora_A", "lora_B"):
            module = modules[part]._modules.get(name)
            if module is not None and (_hooked(module) or module.bias is not None):
                return True
    return _hooked(modules["base_layer"]) or "forward" in vars(modules["base_layer"])


def _plain_dora(layer: PeftLinear, name: str) -> bool:
    """Whether a variant is DoRA, its magnitude beside the weight and without hooks."""
    if type(layer.lora_variant[name]) is not DoraLinearVariant:
        return False
    module: Any = layer.lora_magnitude_vector[name]
    return not _hooked(module) and module.weight.device == layer.base_layer.weight.device


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_not(layer: PeftLinear) -> str | None:
    """Why a PEFT ``Linear`` stays PEFT's, or ``None``."""
    base: Any = layer.base_layer
    if type(base) is not nn.Linear and not _is_conv1d(base):
        return f"its base layer is a {type(base).__name__}, not nn.Linear or Transformers' Conv1D"
    if not base.weight.is_floating_point():
        return f"its base weight is {base.weight.dtype}"
    if layer.fan_in_fan_out != _is_conv1d(base):
        return f"fan_in_fan_out is {layer.fan_in_fan_out} for a {type(base).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced"
    return why_not_adapters(layer)


def _is_conv1d(base: nn.Module) -> bool:
    """Whether ``base`` is GPT-2's linear, whose weight is [in, out]."""
    kind = type(base)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def why_not_adapters(layer: PeftLinear) -> str | None:
    """What of the active adapters or inside the layer no fused call covers, or ``None``."""
    for name in layer.active_adapters:
        if name in layer.lora_variant and type(layer.lora_variant[name]) is not DoraLinearVariant:
            return f"adapter {name!r} uses {type(layer.lora_variant[name]).__name__}"
        if name in layer.lora_B and layer.lora_B[name].bias is not None:
            return f"adapter {name!r} has lora_bias"
    if "forward" in vars(layer.base_layer):
        return "the forward of its base layer was replaced"
    return "it has forward or backward hooks inside" if unsupported_now(layer) else None
