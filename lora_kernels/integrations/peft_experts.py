"""PEFT's LoRA on experts' 3-D parameters (``target_parameters``) without any W + ΔW; see :mod:`.peft`."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from ..adapters.expert_lora import ExpertFactors, side_by_side
from ..nn.expert_parameters import experts_forward, is_routed, why_not_experts
from .peft_linear import PeftNamed, hooked_inside

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FusedParamWrapper(PeftNamed, ParamWrapper):
    """PEFT's ``ParamWrapper`` on an expert module: the branch runs beside W_e on the rows of each expert.

    Wrappers of one module are nested; the outermost computes for all. Calls that are none of ours (merged,
    disabled, keyword arguments, hooks inside, autocast to another dtype than W's) go to PEFT's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        base = self.get_base_layer()
        if kwargs or not is_routed((x, *args)) or _why_not_now(self, base) or _autocast_differs(x, base):
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        found = {one.parameter_name: _factors(one) for one in _nested(self)}
        factors = {name: one for name, one in found.items() if one is not None}
        return experts_forward(base, x, args[0], args[1], factors)


def _nested(layer: Any) -> list[Any]:
    """The layer and the wrappers inside, down to the expert module."""
    found = []
    while isinstance(layer, ParamWrapper):
        found.append(layer)
        layer = layer.base_layer
    return found


def _autocast_differs(x: Tensor, base: Any) -> bool:
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != base.down_proj.dtype


def _factors(layer: Any) -> ExpertFactors | None:
    """Those of the active adapters, their ranks side by side."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return side_by_side([_factors_of(layer, name) for name in names])


def _factors_of(layer: Any, name: str) -> ExpertFactors:
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    found, scaling = ExpertFactors.of(lora_a, lora_b, layer.num_experts, 1.0), layer.scaling[name]
    if isinstance(scaling, Tensor):  # of PEFT's hot swapping
        return found._replace(lora_b=found.lora_b * scaling.to(lora_b))
    return found._replace(scaling=scaling)


def _why_not_now(layer: Any, base: Any) -> str | None:
    """Why a call is none of ours, or ``None``; what it asks may change after ``accelerate``."""
    nested = _nested(layer)
    if not all(isinstance(one, FusedParamWrapper) for one in nested):
        return "a wrapper inside is PEFT's"
    if any(one.disable_adapters or one.merged for one in nested):
        return "it is merged or disabled"
    if "parametrizations" in base._modules:
        return "a parameter of its experts is parametrised"
    if hooked_inside(layer):
        return "it has forward or backward hooks inside"
    return why_not_experts(base)


def why_not(layer: Any) -> str | None:
    """Why a ``ParamWrapper`` stays PEFT's, or ``None``."""
    base = layer.get_base_layer()
    reason = why_not_experts(base)
    if reason is not None:
        return reason
    param = layer.get_param()
    if param.dim() != 3 or layer.num_experts < 2 or layer.parameter_name.endswith("_bias"):
        return f"{layer.parameter_name!r} is no stack of experts' matrices"
    if any(one.get_param().dtype not in _DTYPES for one in _nested(layer)):
        return f"its parameters are {param.dtype}"
    width = param.shape[1 if base.is_transposed else 2]
    if any(one.weight.shape[1] != width for one in layer.lora_A.values()):
        return "its factors have another layout"
    return "its forward was replaced" if "forward" in vars(layer) else None
