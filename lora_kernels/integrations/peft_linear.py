"""PEFT's LoRA ``Linear`` with the fused forward, and what its relatives share with it; see :mod:`.peft`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from torch import Tensor, nn

from .._arguments import LoraInputs
from ..adapters.update import LowRank, Routed, Update, apply_update, apply_updates
from ..nn.groups import grouped
from ..ops.adapter_stack import stack_adapters
from ..ops.dora_linear import fused_dora, scaled_dora
from ..ops.lora_linear import fused
from ..ops.low_rank_norm import low_rank_norm
from ..quant import QuantizedWeight
from .peft_variants import LOWERINGS, PLAIN, UNBIASED, VariantCall, activated

_DROPOUTS = (nn.Identity, nn.Dropout)
_IDENTITY = nn.Identity()
# The keyword arguments of PEFT's that tell of samples, and not of the base layer.
_TOLD = {"adapter_names", "alora_offsets"}


class PeftNamed:
    """Comes before a class of PEFT's: what people print and PEFT's status show goes on under its name."""

    def _get_name(self) -> str:
        # The names of this class and of the one that it extends differ; the latter is PEFT's.
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__.startswith("peft."))


class FusedLoraLinear(PeftNamed, PeftLinear):
    """PEFT's LoRA ``Linear`` with another forward; everything else, state included, is PEFT's.

    y = x Wᵀ + b + Σ_i s_i · (drop_i(x) A_iᵀ) B_iᵀ over the active adapters i, those of a variant (DoRA,
    aLoRA, Arrow, BD-LoRA, KaSA, VeLoRA, MonteCLoRA, MiCA) as it has them; in a mixed batch each sample has
    its own. W of a Transformers ``Conv1D`` is a transposed view. Calls that the fused ops do not cover
    (merged, disabled, a layer changed since) go to PEFT's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        names = () if args else names_now(self, x, kwargs)
        if not names or not self._fits(x):
            return super().forward(x, *args, **kwargs)
        y = grouped(self, x) if len(names) == 1 and not kwargs else None
        return combined(self, names, x, *self._base(), kwargs) if y is None else y

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """W [N, K] and b."""
        base = self._modules["base_layer"]
        weight = parameter(base, "weight")
        return weight.T if self.fan_in_fan_out else weight, parameter(base, "bias")

    def _fits(self, x: Tensor) -> bool:
        same = x.dtype == parameter(self._modules["base_layer"], "weight").dtype
        return same or torch.is_autocast_enabled(x.device.type)

    def group_member(self, x: Tensor) -> LoraInputs | None:
        """What this layer computes for ``x``, where that is one plain fused linear."""
        if self.fan_in_fan_out or not self._fits(x):
            return None
        name = plain_name_now(self, x)
        return None if name is None else inputs_of(self, name, x, *self._base())


def names_now(layer: Any, x: Tensor, told: dict[str, Any]) -> list[str]:
    """The adapters of a call that is ours, none where it is PEFT's; ``told`` are its keyword arguments."""
    if layer.disable_adapters or layer.merged:
        return []
    wanted = layer.active_adapters
    if told:
        each = told.get("adapter_names")
        if not told.keys() <= _TOLD or (each is not None and len(each) != len(x)):
            return []
        wanted = wanted if each is None else list(dict.fromkeys(each))
        if each is not None and _why_not_mixed(layer, wanted):
            return []
    held = layer._modules["lora_A"]._modules
    names = [name for name in wanted if name in held]
    return [] if unsupported_now(layer, names) else names


def plain_name_now(layer: Any, x: Tensor) -> str | None:
    """The one adapter of a call that comes to A, B, s and g whatever x is."""
    names = names_now(layer, x, {})
    plain = len(names) == 1 and type(layer.lora_variant.get(names[0])) in (type(None), *PLAIN)
    return names[0] if plain else None


def combined(
    layer: Any, names: list[str], x: Tensor, weight: Any, bias: Tensor | None, told: dict[str, Any]
) -> Tensor:
    """y of a call that is ours; with no weight what the adapters add alone."""
    if told and told.get("adapter_names") is not None:
        return apply_update(x, weight, bias, _mixed(layer, names, x, told))
    if not layer.lora_variant and len(names) == 1:  # spelled out, since at small sizes a call more shows
        return fused(inputs_of(layer, names[0], x, weight, bias))
    if len(names) == 1 and is_dora(layer, names[0]) and isinstance(weight, Tensor):
        return _dora(layer, names[0], x, weight, bias)
    offsets = told.get("alora_offsets") if told else None
    calls = [VariantCall(x, dropout_of(layer, name), offsets) for name in names]
    updates = [_update(layer, name, call) for name, call in zip(names, calls, strict=True)]
    return apply_updates(x, weight, _biased(layer, names, bias), updates, [call.dropout_p for call in calls])


def _update(layer: Any, name: str, call: VariantCall) -> Update:
    """What the adapter comes to in this call."""
    plain = _plain_update(layer, name)
    if is_dora(layer, name):
        return _ungated(plain)._replace(magnitude=magnitude_of(layer.lora_magnitude_vector[name]))
    variant = layer.lora_variant.get(name)
    return plain if variant is None else LOWERINGS[type(variant)](layer, name, plain, call)


def _plain_update(layer: Any, name: str) -> LowRank:
    """A, B, s and g as they are without any variant."""
    lora_a, lora_b = _factors(layer, name)
    return LowRank(lora_a, lora_b, *scale_and_gate(layer.scaling[name], lora_a))


def _ungated(plain: LowRank) -> LowRank:
    """The same with g taken into B."""
    return plain if plain.gate is None else plain._replace(lora_b=plain.lora_b * plain.gate, gate=None)


def _mixed(layer: Any, names: list[str], x: Tensor, told: dict[str, Any]) -> Routed:
    """Of a batch whose samples have adapters of their own: no other one, and those of aLoRA on few tokens."""
    found: list[Any] = [_plain_update(layer, name) for name in names]
    for i, name in enumerate(names):
        variant = layer.lora_variant.get(name)
        if type(variant) in PLAIN:
            found[i] = LOWERINGS[type(variant)](layer, name, found[i], VariantCall(x, 0.0, None))
    found = [_ungated(one) for one in found]
    lora_as, lora_bs = ([one[i] for one in found] for i in (0, 1))
    experts = stack_adapters(lora_as, lora_bs, [one.scaling for one in found])
    number = {name: i for i, name in enumerate(names)}
    ids = torch.tensor([number.get(name, -1) for name in told["adapter_names"]], device=x.device)
    activates = [type(layer.lora_variant.get(name)) is ALoraLinearVariant for name in told["adapter_names"]]
    if not any(activates):
        return Routed(experts, ids[:, None], x.new_ones(len(ids), 1))
    tokens, offsets = x.shape[1] if x.dim() == 3 else 1, told.get("alora_offsets")
    each = [None] * len(ids) if offsets is None else offsets
    counts = [one if only else tokens for only, one in zip(activates, each, strict=True)]
    acts = activated(counts, len(ids), tokens, x).view(*x.shape[:-1], 1)
    return Routed(experts, ids.view(-1, *[1] * (x.dim() - 1)).expand(acts.shape), acts)


def _why_not_mixed(layer: Any, names: list[str]) -> str | None:
    """Why a batch of these adapters is none of ours, or ``None``."""
    for name in names:
        variant = layer.lora_variant.get(name)
        if variant is not None and type(variant) not in (*PLAIN, ALoraLinearVariant):
            return f"adapter {name!r} uses {type(variant).__name__}"
        if name in layer.lora_A and (dropout_of(layer, name) or _bias_of(layer, name) is not None):
            return f"adapter {name!r} drops or has lora_bias"
    return None


def is_dora(layer: Any, name: str) -> bool:
    """Whether the adapter has a magnitude."""
    return type(layer.lora_variant.get(name)) is DoraLinearVariant


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
    """The call of an adapter that :func:`plain_name_now` names, with the base product for a weight."""
    variant, p, plain = layer.lora_variant.get(name), dropout_of(layer, name), _plain_update(layer, name)
    if variant is not None:
        plain = LOWERINGS[type(variant)](layer, name, plain, VariantCall(x, p, None))  # type: ignore[assignment]
    lora_a, lora_b, scaling, gate, *_ = plain
    bias = _biased(layer, (name,), bias)
    return LoraInputs(x, weight, lora_a, lora_b, bias, gate, None, None, scaling, p)  # type: ignore[arg-type]


def _bias_of(layer: Any, name: str) -> Tensor | None:
    """That of B (``lora_bias``): BD-LoRA's knows none, and a replica has it as an attribute."""
    return getattr(layer._modules["lora_B"]._modules[name], "bias", None)


def _biased(layer: Any, names: Iterable[str], bias: Tensor | None) -> Tensor | None:
    """b + Σ_i s_i b_i, of b's dtype."""
    for name in names:
        own = _bias_of(layer, name)
        if own is not None:
            own = own * layer.scaling[name]
            bias = own if bias is None else (bias + own).to(bias.dtype)
    return bias


def _dora(layer: PeftLinear, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    lora_a, lora_b, scaling, *_ = cast(Any, _ungated(_plain_update(layer, name)))
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


def unsupported_now(layer: Any, names: Iterable[str]) -> str | None:
    """Why no fused call of these adapters covers the layer as it is now, or ``None``.

    What it asks may change after :func:`accelerate`. A base layer whose forward was replaced is one of
    these: Accelerate's device maps do that.
    """
    modules = layer._modules
    for name in names:
        if name in layer.lora_variant and (reason := _why_not_variant(layer, name, names)):
            return reason
        dropout = modules["lora_dropout"]._modules.get(name, _IDENTITY)
        if type(dropout) not in _DROPOUTS:
            return f"adapter {name!r} has {type(dropout).__name__} for its dropout, not nn.Dropout"
        for part in ("lora_A", "lora_B"):
            module = modules[part]._modules.get(name)
            if module is not None and hooked(module):
                return f"adapter {name!r} has forward or backward hooks on {part}"
    if "forward" in vars(modules["base_layer"]):
        return "the forward of its base layer was replaced"
    return "its base layer has forward or backward hooks" if hooked(modules["base_layer"]) else None


def _why_not_variant(layer: Any, name: str, names: Iterable[str]) -> str | None:
    kind = type(layer.lora_variant[name])
    if kind is DoraLinearVariant:
        return _why_not_dora(layer, name, names)
    if kind not in LOWERINGS:
        return f"adapter {name!r} uses {kind.__name__}"
    if kind in UNBIASED and _bias_of(layer, name) is not None:
        return f"adapter {name!r} has lora_bias beside {kind.__name__}"
    return None


def _why_not_dora(layer: Any, name: str, names: Iterable[str]) -> str | None:
    """Why no fused call covers DoRA, its magnitude beside the weight and without hooks."""
    module: Any = layer.lora_magnitude_vector[name]
    if hooked(module):
        return f"adapter {name!r} has forward or backward hooks on its magnitude"
    if module.weight.device != layer.base_layer.weight.device:
        return f"the magnitude of adapter {name!r} is on {module.weight.device}"
    several = [one for one in names if one in layer.lora_A and one != name]
    if any(_bias_of(layer, one) is not None for one in several):
        return f"adapter {name!r} uses DoRA beside one with lora_bias"
    alone = not several and layer.base_layer.weight.is_floating_point()
    cached = dora.ENABLE_DORA_CACHING and not layer.training
    return "PEFT's DoraCaching keeps its norms" if cached and not alone else None


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to the module's calls."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def hooked_inside(layer: Any) -> bool:
    """Whether somebody listens to the calls of any module below the layer."""
    # A list, since the generators of ``modules()`` take as long as the thin products of a call.
    inside = list(layer._modules.values())
    while inside:
        module = inside.pop()
        if module is not None:
            if hooked(module):
                return True
            inside += module._modules.values()
    return False


def why_not(layer: PeftLinear) -> str | None:
    """Why a PEFT ``Linear`` stays PEFT's, or ``None``."""
    return why_not_base(layer) or unsupported_now(layer, layer.active_adapters)


def why_not_base(layer: Any) -> str | None:
    """Why no op of ours computes with a linear's base layer, or ``None``."""
    base = layer.base_layer
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"its base layer is a {type(base).__name__}, not nn.Linear or Transformers' Conv1D"
    if not base.weight.is_floating_point():
        return f"its base weight is {base.weight.dtype}"
    fan_in_fan_out = getattr(layer, "fan_in_fan_out", is_conv1d(base))  # not all tuners have it
    if fan_in_fan_out != is_conv1d(base):
        return f"fan_in_fan_out is {fan_in_fan_out} for a {type(base).__name__}"
    return "its forward was replaced" if "forward" in vars(layer) else None


def is_conv1d(base: nn.Module) -> bool:
    """Whether ``base`` is GPT-2's linear, whose weight is [in, out]."""
    kind = type(base)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
