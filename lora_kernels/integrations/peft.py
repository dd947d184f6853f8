"""One line that makes a live PEFT model use the fused LoRA linear."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..nn.groups import Member, group_layers, grouped, ungroup_layers, why_alone, why_alone_compiled
from ..nn.mlp import fuse_mlps, unfuse_mlps
from ..ops.dora_linear import fused_dora
from ..ops.lora_linear import fused
from ..quant import QuantizedWeight
from .peft_layers import FUSED as OTHERS
from .peft_layers import why_not as why_not_other

_DROPOUTS = (nn.Identity, nn.Dropout)


@dataclass
class Report:
    """Which layers :func:`accelerate` took over, and which stay PEFT's with the reason."""

    accelerated: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    # Layers that share an input and are computed together, and those beside others that are not.
    groups: list[tuple[str, ...]] = field(default_factory=list)
    alone: list[tuple[str, str]] = field(default_factory=list)
    # Layers of a group that compiled models compute one by one.
    alone_compiled: list[tuple[str, str]] = field(default_factory=list)
    # Gated MLPs that are one call.
    mlps: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"lora-kernels: {len(self.accelerated)} LoRA layers fused, {len(self.skipped)} left to PEFT"]
        if self.groups:
            lines[0] += (
                f"; {sum(map(len, self.groups))} of them in {len(self.groups)} groups that share an input"
            )
        if self.mlps:
            lines[0] += f"; {len(self.mlps)} gated MLPs in one call each"
        lines += [f"  {name}: {reason}" for name, reason in self.skipped]
        lines += [f"  {name}: alone, {reason}" for name, reason in self.alone]
        lines += [f"  {name}: alone when compiled, {reason}" for name, reason in self.alone_compiled]
        return "\n".join(lines)


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
        if len(names) > 1 and not any(_dropout(self, name) for name in names):
            return fused(x, weight, *_stacked(self, names, base.bias))
        y = _branch(self, names[0], x, weight, base.bias)
        for name in names[1:]:
            y = y + _branch(self, name, x, None, None)
        return y

    def _names_now(self, x: Tensor) -> list[str]:
        """The adapters of a call that is ours, none where it is PEFT's."""
        if self.disable_adapters or self.merged or _unsupported_now(self):
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
        return Member(base.weight, lora_a, lora_b, base.bias, None, self.scaling[name], _dropout(self, name))


# The class that takes over each of PEFT's, and those of bitsandbytes' layers where PEFT has made any.
FUSED: dict[type[nn.Module], type[nn.Module]] = {PeftLinear: FusedLoraLinear, **OTHERS}


def _fused_types() -> dict[type[nn.Module], type[nn.Module]]:
    if "peft.tuners.lora.bnb" not in sys.modules:
        return FUSED
    from . import peft_quantized  # not at the top: it imports bitsandbytes

    return {**FUSED, **peft_quantized.FUSED}


def _dropout(layer: PeftLinear, name: str) -> float:
    module = layer._modules["lora_dropout"]._modules[name]
    return module.p if module.training and isinstance(module, nn.Dropout) else 0.0


def _branch(
    layer: PeftLinear, name: str, x: Tensor, weight: Tensor | QuantizedWeight | None, bias: Tensor | None
) -> Tensor:
    lora_a = layer._modules["lora_A"]._modules[name].weight
    lora_b = layer._modules["lora_B"]._modules[name].weight
    return fused(x, weight, lora_a, lora_b, bias, None, None, layer.scaling[name], _dropout(layer, name))


def _dora(layer: PeftLinear, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    magnitude = layer.lora_magnitude_vector[name].weight
    return fused_dora(x, weight, lora_a, lora_b, magnitude, bias, layer.scaling[name], _dropout(layer, name))


def _stacked(layer: PeftLinear, names: list[str], bias: Tensor | None) -> tuple[Any, ...]:
    """The arguments of one call for several adapters: ranks side by side, their scales in the gate."""
    lora_a = torch.cat([layer.lora_A[name].weight for name in names])
    lora_b = torch.cat([layer.lora_B[name].weight for name in names], 1)
    gates = [lora_a.new_full((layer.lora_A[name].weight.shape[0],), layer.scaling[name]) for name in names]
    return lora_a, lora_b, bias, torch.cat(gates), None, 1.0, 0.0


def _unsupported_now(layer: PeftLinear) -> bool:
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


_IDENTITY = nn.Identity()


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _why_not(layer: nn.Module) -> str | None:
    """Why ``layer`` stays PEFT's, or ``None``."""
    types = _fused_types()
    if type(layer) in types.values():
        return None
    if type(layer) in OTHERS:
        return why_not_other(layer)
    if type(layer) is not PeftLinear and type(layer) in types:
        from . import peft_quantized

        return peft_quantized.why_not(layer)
    if type(layer) is not PeftLinear:
        return f"{type(layer).__module__}.{type(layer).__name__} is not PEFT's LoRA Linear"
    base: Any = layer.base_layer
    if type(base) is not nn.Linear and not _is_conv1d(base):
        return f"its base layer is a {type(base).__name__}, not nn.Linear or Transformers' Conv1D"
    if not base.weight.is_floating_point():
        return f"its base weight is {base.weight.dtype}"
    if layer.fan_in_fan_out != _is_conv1d(base):
        return f"fan_in_fan_out is {layer.fan_in_fan_out} for a {type(base).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced"
    return _why_not_adapters(layer)


def _is_conv1d(base: nn.Module) -> bool:
    """Whether ``base`` is GPT-2's linear, whose weight is [in, out]."""
    kind = type(base)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _why_not_adapters(layer: PeftLinear) -> str | None:
    for name in layer.active_adapters:
        if name in layer.lora_variant and type(layer.lora_variant[name]) is not DoraLinearVariant:
            return f"adapter {name!r} uses {type(layer.lora_variant[name]).__name__}"
        if name in layer.lora_B and layer.lora_B[name].bias is not None:
            return f"adapter {name!r} has lora_bias"
    if "forward" in vars(layer.base_layer):
        return "the forward of its base layer was replaced"
    return "it has forward or backward hooks inside" if _unsupported_now(layer) else None


def accelerate(model: nn.Module) -> Report:
    """Makes the LoRA layers of a PEFT model compute with the fused ops, in place.

    That is ``Linear`` (also on a Transformers ``Conv1D``), ``Embedding`` and the convolutions, with DoRA too,
    and ``Linear`` over bitsandbytes' ``Linear4bit`` (NF4: QLoRA) and ``Linear8bitLt``, whose packed weight is
    read where it lies.

    Layers that a forward calls on one x (query, key and value; gate and up) are computed together, and
    the gated MLPs of Llama, Mistral, Qwen and Gemma with LoRA on all three dense layers by ``lora_mlp``.

    PEFT's API goes on working (``set_adapter``, ``disable_adapter``, ``merge_and_unload``,
    ``save_pretrained``), and so do pickling and copying. :func:`decelerate` reverses it.

    Args:
        model: a model of ``get_peft_model``, or any module that holds PEFT LoRA layers.

    Returns:
        Which layers are fused and, for the others, why not.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it holds no LoRA layer of PEFT.
    """
    report, types = Report(), _fused_types()
    for name, layer in _lora_layers(model):
        reason = _why_not(layer)
        if reason is None:
            layer.__class__ = types.get(type(layer), type(layer))
            report.accelerated.append(name)
        else:
            report.skipped.append((name, reason))
    report.groups = group_layers(model)
    report.alone = why_alone(model, report.groups)
    report.alone_compiled = why_alone_compiled(model)
    report.mlps = fuse_mlps(model)
    return report


def decelerate(model: nn.Module) -> int:
    """Gives every layer back to PEFT; returns how many there were."""
    plain = {fused_type: peft_type for peft_type, fused_type in _fused_types().items()}
    layers = [layer for _, layer in _lora_layers(model) if type(layer) in plain]
    ungroup_layers(model)
    unfuse_mlps(model)
    for layer in layers:
        layer.__class__ = plain[type(layer)]
    return len(layers)


def _lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(
            f"model: expected a model with PEFT LoRA layers, got {type(model).__name__} with none"
        )
    return layers
