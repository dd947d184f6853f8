"""Puts planned adapters into a model, exchanges and takes them out again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LoRAConfig
from ..init import GIVEN
from . import owned
from .adapted import CONFIGS, check_adapters, is_combined, lora_configs, lora_layers
from .adapter_layer import AdapterLayer
from .exposed import expose_weights, hide_weights
from .groups import group_layers, ungroup_layers, why_alone
from .invocation import find_invocations
from .mlp import fuse_mlps, unfuse_mlps
from .outdated import note_deleted, note_replaced
from .planned import PlannedAdapter
from .quantized import QuantizedLinear
from .side_inputs import open_calls
from .sites import Target
from .wrappers import check_whole, unwrapped

logger = logging.getLogger(__name__)


def check_place(model: nn.Module, adapter_name: str) -> None:
    """Whether other tensors than are there can be the adapter's.

    Raises:
        RuntimeError: FSDP2 has taken over the parameters.
    """
    there = adapter_name in lora_configs(model)
    replace, add = f"replace {adapter_name!r} by tensors of other shapes", f"add the adapter {adapter_name!r}"
    check_whole(model, replace if there else add)


def install(
    model: nn.Module, config: LoRAConfig, adapter_name: str, plan: PlannedAdapter, *, fuse: bool = True
) -> None:
    """Adds a planned adapter; the model's first one becomes active, and what is none of its own is frozen."""
    check_place(model, adapter_name)
    first = not lora_configs(model)
    for _, layer, adapter in plan.layers:
        layer.check_new(adapter_name, adapter, first)
    if first:
        for parameter in model.parameters():
            parameter.requires_grad = False  # the method is not for a lazy layer's
    for site, layer, adapter in plan.layers:
        layer.add_adapter(adapter_name, adapter, activate=first)
        put_in_place(site, layer)
    owned.add(adapter_name, plan.owned, plan.trained)
    if first:
        owned.choose(model, (adapter_name,))
    if fuse:
        combine(model)
    expose_weights(model)
    vars(unwrapped(model)).setdefault(CONFIGS, {})[adapter_name] = config
    open_side_calls(model)


def reinstall(model: nn.Module, config: LoRAConfig, adapter_name: str, plan: PlannedAdapter) -> None:
    """Puts a planned adapter in the place of the one called ``adapter_name``, active as that was.

    A parameter that both have in one shape stays the same object; where others come or go, an optimiser that
    was made before says so at its next step.

    Raises:
        RuntimeError: a layer of either is merged, FSDP2 has taken over the parameters, or
            :func:`owned.check_choice` refuses. The model is then as it was.
    """
    check_place(model, adapter_name)
    layers = lora_layers(model)
    for layer in (*layers.values(), *(layer for _, layer, _ in plan.layers)):
        layer._must_be_unmerged(f"replace {adapter_name!r}")
    for _, layer, adapter in plan.layers:
        layer.check_new(adapter_name, adapter, False)
    active = any(adapter_name in layer.active for layer in layers.values())
    acting = owned.acting(model) - {adapter_name}
    owned.check_choice(model, acting)
    before = list(_trained(model, adapter_name))
    plan = _keep_parameters(model, adapter_name, plan)
    kept, combined = {id(layer) for _, layer, _ in plan.layers}, is_combined(model)
    for layer in layers.values():
        if adapter_name in layer.adapters and id(layer) not in kept:
            layer.drop_adapter(adapter_name)
    for site, layer, adapter in plan.layers:
        _exchange(layer, adapter_name, adapter, active)
        put_in_place(site, layer)
    owned.forget(model, adapter_name)
    owned.add(adapter_name, plan.owned, plan.trained)
    if active:
        owned.choose(model, {*acting, adapter_name})
    if combined:
        combine(model)
    expose_weights(model)
    vars(unwrapped(model))[CONFIGS][adapter_name] = config
    open_side_calls(model)
    note_replaced(f"the adapter {adapter_name!r} that was loaded", before, _trained(model, adapter_name))


def _trained(model: nn.Module, adapter_name: str) -> Iterator[Tensor]:
    """What trains of an adapter, and of what it owns."""
    for layer in lora_layers(model).values():
        if adapter_name in layer.adapters:
            yield from (one for one in layer.adapters[adapter_name].parameters() if one.requires_grad)
    yield from (one for one in owned.owned_tensors(model, adapter_name).values() if one.requires_grad)


def _all_of(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """Every parameter of these adapters, and what they own."""
    found: list[Tensor] = []
    for name in names:
        for layer in lora_layers(model).values():
            found += layer.adapters[name].parameters() if name in layer.adapters else ()
        found += owned.owned_tensors(model, name).values()
    return found


def _keep_parameters(model: nn.Module, adapter_name: str, plan: PlannedAdapter) -> PlannedAdapter:
    """The plan with the very parameters of the adapter that is there, where their shapes do, filled anew."""
    found: dict[int, Tensor] = {}
    for _, layer, adapter in plan.layers:
        old = dict(layer.adapters.items()).get(adapter_name)
        there = {} if old is None else dict(old.named_parameters())
        for name, parameter in adapter.named_parameters():
            _keep(parameter, there.get(name), found)
        for module in adapter.modules():
            for name, one in module._parameters.items():
                module._parameters[name] = found.get(id(one), one)  # type: ignore[assignment]
    own = owned.places(model, adapter_name)
    for place, tensor in plan.owned.items():
        _keep(tensor, own.get(place), found)
    return plan._replace(owned={place: found.get(id(one), one) for place, one in plan.owned.items()})


@torch.no_grad()
def _keep(new: Tensor, old: Tensor | None, found: dict[int, Tensor]) -> None:
    """Fills ``old`` with the values of ``new`` and notes that it takes its place, where it can."""
    taken = any(one is old for one in found.values())
    if not isinstance(old, nn.Parameter) or not isinstance(new, nn.Parameter) or taken or id(new) in found:
        return
    if (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
        old.copy_(new)
        old.grad = None
        found[id(new)] = old


def check_retune(plan: PlannedAdapter, adapter_name: str) -> None:
    """Raises a RuntimeError where the adapter is merged, so that its new tensors would not act."""
    for _, layer, _ in plan.layers:
        if adapter_name in layer.merged:
            layer._must_be_unmerged(f"fill {adapter_name!r}")


def retune(model: nn.Module, config: LoRAConfig, adapter_name: str, plan: PlannedAdapter) -> None:
    """Gives the adapter that is there the settings of a planned one that has the same tensors.

    What such a start takes out of W is taken anew, in place.
    """
    for _, layer, adapter in plan.layers:
        there = layer.adapters[adapter_name]
        there.take_settings(adapter)
        for name in GIVEN:
            if name in adapter._buffers:
                there._buffers[name].copy_(adapter._buffers[name])  # type: ignore[union-attr, arg-type]
        if adapter.rest is not None:
            layer.take_again(adapter)
    vars(unwrapped(model))[CONFIGS][adapter_name] = config
    open_side_calls(model)


def _exchange(layer: AdapterLayer, name: str, adapter: Adapter, active: bool) -> None:
    """Lets ``adapter`` be the layer's ``name``; what trains beside it, and what is active, stay so."""
    acting = (*layer.active, *([name] if active and name not in layer.active else ()))
    old = dict(layer.adapters.items()).get(name)
    trains = active if old is None else any(p.requires_grad for p in old.parameters())
    if old is not None:
        layer.drop_adapter(name)
    flags = [(p, p.requires_grad) for p in layer.adapters.parameters()]
    layer.add_adapter(name, adapter, activate=False)
    layer.set_adapter(acting)
    adapter.set_trainable(trains)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forgets the adapter ``name`` with all that it owns; others that were active remain so.

    An optimiser that holds its parameters says so at its next step.

    Raises:
        ValueError: no layer has an adapter of that name.
        RuntimeError: it is merged.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear")
        >>> model = apply_lora(apply_lora(nn.Sequential(nn.Linear(4, 4)), config, "a"), config, "b")
        >>> delete_adapter(model, "b")
        >>> list(model[0].adapters)
        ['a']
    """
    layers = {at: layer for at, layer in lora_layers(model).items() if name in layer.adapters}
    check_adapters(layers, (name,))
    for layer in layers.values():
        if name in layer.merged:
            layer._must_be_unmerged(f"delete {name!r}")
    combined, before = is_combined(model), _all_of(model, (name,))
    for layer in layers.values():
        layer.drop_adapter(name)
    owned.forget(model, name)
    note_deleted(f"the adapter {name!r} that was deleted", before, model.parameters())
    if combined:
        combine(model)
    expose_weights(model)
    vars(unwrapped(model)).get(CONFIGS, {}).pop(name, None)
    open_side_calls(model)


def remove_lora(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Puts the base layer back wherever there is one with adapters.

    The base parameters are the original ones and stay frozen. With ``merge`` the layers carry the active
    adapters in new weights, and what these own stays in the model. An optimiser that holds parameters of the
    adapters says so at its next step.

    Raises:
        RuntimeError: FSDP2 has taken over the parameters.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> type(remove_lora(model, merge=True)[0]).__name__
        'Linear'
    """
    check_whole(model, "take adapters out of their layers")
    before = _all_of(model, {name for layer in lora_layers(model).values() for name in layer.adapters})
    ungroup_layers(model)
    unfuse_mlps(model)
    hide_weights(model)
    owned.settle(model, merge)
    plain: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if isinstance(child, AdapterLayer):
                if id(child) not in plain:
                    plain[id(child)] = child.to_base(merge=merge)
                    if not isinstance(plain[id(child)], QuantizedLinear):  # it keeps off the fast path too
                        _drop_hook(plain[id(child)])
                parent._modules[attribute] = plain[id(child)]
    vars(unwrapped(model)).pop(CONFIGS, None)
    open_side_calls(model)
    note_deleted("adapters that were removed", before, model.parameters())
    return model


def combine(model: nn.Module) -> None:
    """Finds what can be computed together, after layers came or went."""
    groups = group_layers(model)
    fuse_mlps(model)
    if logger.isEnabledFor(logging.INFO):  # reading sources takes time
        for name, reason in why_alone(model, groups):
            logger.info("%s: alone, %s", name, reason)


def open_side_calls(model: nn.Module) -> None:
    """Lets the model open a call a forward pass where one of its adapters passes values on."""
    adapters = (one for layer in lora_layers(model).values() for one in layer.adapters.values())
    open_calls(unwrapped(model), any(one.passes_on for one in adapters))
    sequences = (config.alora_invocation_tokens for config in lora_configs(model).values())
    find_invocations(unwrapped(model), {tuple(one) for one in sequences if one})


def put_in_place(site: Target, layer: nn.Module) -> None:
    for parent, attribute in site.places:
        parent._modules[attribute] = layer
        keep_off_fast_path(parent, layer)


def keep_off_fast_path(parent: nn.Module, layer: nn.Module) -> None:
    """Gives ``layer`` a hook where its parent's fast path would otherwise pass it by.

    Without gradients torch's encoder layer reads the linears' weights and calls none of them, unless one has
    a hook.
    """
    if isinstance(parent, nn.TransformerEncoderLayer) and not layer._forward_pre_hooks:
        layer.register_forward_pre_hook(_keep_off_fast_path)


def _keep_off_fast_path(module: nn.Module, args: object) -> None:
    return None


def _drop_hook(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _keep_off_fast_path:
            del module._forward_pre_hooks[key]
