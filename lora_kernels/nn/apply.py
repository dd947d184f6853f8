"""Verbs on whole models: quantise, apply, choose, merge, count, remove."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import METHODS, Adapter, LoRAConfig
from . import owned
from .adapter_layer import AdapterLayer, _check_name, inside_adapters
from .conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from .embedding import LoRAEmbedding
from .exposed import expose_weights, hide_weights, why_no_layer, with_adapters
from .groups import group_layers, layer_groups, ungroup_layers
from .linear import LinearAdapterLayer, LoRALinear
from .mlp import fuse_mlps, fused_mlps, unfuse_mlps
from .quantized import QuantizedLinear, QuantizedLoRALinear
from .side_inputs import open_calls
from .weight_reads import Reads, weight_reads
from .wrappers import is_wrapper, plain_key, plain_names, unwrapped

ALL_LINEAR = "all-linear"
_CONFIGS = "_lora_configs"
_OURS = __name__.split(".")[0] + "."
# The drop-in layer of each base layer.
LAYERS: dict[type[nn.Module], type[AdapterLayer]] = {
    cls.base_type: cls
    for cls in (LoRALinear, QuantizedLoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d)
}
LINEARS = (nn.Linear, QuantizedLinear)


def layer_types() -> dict[type[nn.Module], type[AdapterLayer]]:
    """:data:`LAYERS`, and with Transformers' ``Conv1D`` where that is loaded."""
    if "transformers.pytorch_utils" not in sys.modules:
        return LAYERS
    from .transposed import LoRATransposedLinear

    return {**LAYERS, LoRATransposedLinear.base_type: LoRATransposedLinear}


def _layer_type(module: nn.Module) -> type[AdapterLayer]:
    return next(layer for base, layer in layer_types().items() if isinstance(module, base))


def _linear_types() -> tuple[type[nn.Module], ...]:
    return tuple(base for base, layer in layer_types().items() if issubclass(layer, LinearAdapterLayer))


class Target(NamedTuple):
    """One layer of a model: every (parent, attribute) that holds it, and its first dotted name.

    ``plain`` is that name without what ``torch.compile``, DDP or FSDP put into it.
    """

    name: str
    linear: nn.Module
    places: list[tuple[nn.Module, str]]
    plain: str


# Plain name of a layer -> name of a statistic -> tensor.
_Statistics = Mapping[str, Mapping[str, Tensor]]


class Plan(NamedTuple):
    """An adapter that is not yet there: its part of each layer, and the tensors of the model that it owns."""

    layers: list[tuple[Target, AdapterLayer, Adapter]]
    owned: dict[owned.Place, Tensor]
    trained: tuple[owned.Place, ...]


def apply_lora(
    model: nn.Module,
    config: LoRAConfig,
    adapter_name: str = "default",
    *,
    fuse: bool = True,
    statistics: _Statistics | None = None,
) -> nn.Module:
    """Replaces the targeted layers of ``model`` in place by ones with adapters and freezes the rest.

    A target is an ``nn.Linear``, ``nn.Embedding`` or ``nn.Conv1d``, ``2d`` or ``3d``; it becomes a
    :class:`LoRALinear`, :class:`LoRAEmbedding`, … on the same parameters; so do a
    :class:`QuantizedLinear` and the ``Conv1D`` of Transformers' GPT-2. A layer that is shared by several
    parents is replaced once, in all of them. A second call with another ``adapter_name`` adds an adapter to
    the layers, inactive until :func:`set_adapter`. Linears that a forward calls on one x (query, key and
    value; gate and up) are computed together; :func:`layer_groups` lists them.

    Args:
        model: any module that contains such layers.
        config: what to adapt and how.
        adapter_name: name of the new adapter.
        fuse: whether linears that share an input, and gated MLPs, are computed together, which
            :func:`group_layers` and :func:`fuse_mlps` also do later. ``False`` leaves the model's classes
            and forwards as they are.
        statistics: of :func:`lora_kernels.calibrate`, for initialisers that start from samples.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: not a module, or not a config.
        ValueError: no layer matches ``target_modules``, a match cannot be adapted, the name is taken, or the
            statistics that the initialiser needs are not there. The model is then as it was.
        RuntimeError: the adapter owns parameters (``modules_to_save``, biases) that FSDP2 has taken over.
    """
    _check_types(model, config)
    _check_name(adapter_name, lora_configs(model))
    plan = plan_adapter(model, config, statistics=statistics)
    for _, layer, _ in plan.layers:
        _check_name(adapter_name, layer.adapters)
    install(model, config, adapter_name, plan, fuse=fuse)
    for one in config.modules_to_save or ():
        if not any(name.endswith(one) for name in owned.saved_modules(model, config)):
            warnings.warn(f"modules_to_save: no module's name ends in {one!r}", stacklevel=2)
    return model


def plan_adapter(
    model: nn.Module, config: LoRAConfig, *, draw: bool = True, statistics: _Statistics | None = None
) -> Plan:
    """What :func:`apply_lora` would add; the model stays as it is.

    Without ``draw`` all new tensors are memory that nobody wrote to.

    Raises:
        TypeError: a wrong type.
        ValueError: as :func:`apply_lora`, but for the name.
    """
    _check_types(model, config)
    if statistics is not None and not isinstance(statistics, Mapping):
        raise TypeError(f"statistics: expected those of calibrate, got {type(statistics).__name__}")
    layers = _prepare_all(find_sites(model, config), config, draw, statistics or {})
    adapted = {site.linear: layer for site, layer, _ in layers}
    if config.ensure_weight_tying:
        _check_ties(model, adapted)
    places = tuple(owned.config_places(model, config, adapted))
    return Plan(layers, owned.copies(places, config.ensure_weight_tying, draw), places)


def _check_ties(model: nn.Module, adapted: dict[nn.Module, AdapterLayer]) -> None:
    """Raises where an adapted embedding shares its weight, for which PEFT ties two adapters."""
    for module, layer in adapted.items():
        if isinstance(layer, nn.Embedding):
            shared = owned.sharing(model, {id(owned.base_tensor((module, "weight")))})
            if any(other is not module for other, _ in shared):
                raise ValueError(
                    "ensure_weight_tying: expected False where an adapter is put on an embedding whose weight"
                    " another module shares"
                )


def install(
    model: nn.Module, config: LoRAConfig, adapter_name: str, plan: Plan, *, fuse: bool = True
) -> None:
    """Adds a planned adapter; the model's first one becomes active, and what is none of its own is frozen."""
    owned.check_add(model, plan.owned)
    first = not lora_configs(model)
    for _, layer, adapter in plan.layers:
        layer.check_new(adapter_name, adapter, first)
    if first:
        for parameter in model.parameters():
            parameter.requires_grad = False  # the method is not for a lazy layer's
    for site, layer, adapter in plan.layers:
        layer.add_adapter(adapter_name, adapter, activate=first)
        _install(site, layer)
    owned.add(adapter_name, plan.owned, plan.trained)
    if first:
        owned.choose(model, (adapter_name,))
    if fuse:
        _combine(model)
    expose_weights(model)
    _open_calls(model)
    vars(unwrapped(model)).setdefault(_CONFIGS, {})[adapter_name] = config


def reinstall(model: nn.Module, config: LoRAConfig, adapter_name: str, plan: Plan) -> None:
    """Puts a planned adapter in the place of the one called ``adapter_name``, active as that was.

    Raises:
        RuntimeError: a layer of either is merged, or :func:`owned.check_choice` refuses. The model is then as
            it was.
    """
    layers = lora_layers(model)
    for layer in (*layers.values(), *(layer for _, layer, _ in plan.layers)):
        layer._must_be_unmerged(f"replace {adapter_name!r}")
    for _, layer, adapter in plan.layers:
        layer.check_new(adapter_name, adapter, False)
    active = any(adapter_name in layer.active for layer in layers.values())
    acting = owned.acting(model) - {adapter_name}
    owned.check_add(model, plan.owned)
    owned.check_choice(model, acting)
    kept, combined = {id(layer) for _, layer, _ in plan.layers}, is_combined(model)
    for layer in layers.values():
        if adapter_name in layer.adapters and id(layer) not in kept:
            layer.delete_adapter(adapter_name)
    for site, layer, adapter in plan.layers:
        _exchange(layer, adapter_name, adapter, active)
        _install(site, layer)
    owned.forget(model, adapter_name)
    owned.add(adapter_name, plan.owned, plan.trained)
    if active:
        owned.choose(model, {*acting, adapter_name})
    if combined:
        _combine(model)
    expose_weights(model)
    _open_calls(model)
    vars(unwrapped(model))[_CONFIGS][adapter_name] = config


def retune(model: nn.Module, config: LoRAConfig, adapter_name: str, plan: Plan) -> None:
    """Gives the adapter that is there the settings of a planned one that has the same tensors."""
    for _, layer, adapter in plan.layers:
        layer.adapters[adapter_name].take_settings(adapter)
    vars(unwrapped(model))[_CONFIGS][adapter_name] = config


def _exchange(layer: AdapterLayer, name: str, adapter: Adapter, active: bool) -> None:
    """Lets ``adapter`` be the layer's ``name``; what trains beside it, and what is active, stay so."""
    acting = (*layer.active, *([name] if active and name not in layer.active else ()))
    old = dict(layer.adapters.items()).get(name)
    trains = active if old is None else any(p.requires_grad for p in old.parameters())
    if old is not None:
        layer.delete_adapter(name)
    flags = [(p, p.requires_grad) for p in layer.adapters.parameters()]
    layer.add_adapter(name, adapter, activate=False)
    layer.set_adapter(acting)
    adapter.set_trainable(trains)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _combine(model: nn.Module) -> None:
    """Finds what can be computed together, after layers came or went."""
    group_layers(model)
    fuse_mlps(model)


def _open_calls(model: nn.Module) -> None:
    """Lets the model open a call a forward pass where one of its adapters passes values on."""
    adapters = (one for layer in lora_layers(model).values() for one in layer.adapters.values())
    open_calls(unwrapped(model), any(one.passes_on for one in adapters))


def is_combined(model: nn.Module) -> bool:
    """Whether anything of the model is computed together."""
    return bool(layer_groups(model) or fused_mlps(model))


def lora_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """The config of each adapter that :func:`apply_lora` put on ``model``, by name."""
    return dict(vars(unwrapped(model)).get(_CONFIGS, {}))


def lora_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Dotted name -> layer, each layer once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)}


def _check_types(model: nn.Module, config: LoRAConfig) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config: expected a LoRAConfig, got {type(config).__name__}")


def _prepare_all(
    targets: list[Target], config: LoRAConfig, draw: bool, statistics: _Statistics
) -> list[tuple[Target, AdapterLayer, Adapter]]:
    """The layer for each target and its new adapter, nothing yet changed."""
    tensors: dict[Any, nn.Parameter] = {}
    latest: dict[str, Adapter] = {}
    real: dict[int, Tensor] = {}
    made = []
    for target in targets:
        role = target.plain.rpartition(".")[2]
        where: dict[str, Any] = {"name": target.plain, "tensors": tensors, "previous": latest.get(role)}
        where["statistics"] = statistics.get(target.plain, {})
        layer = _layer_for(target)
        make = layer.make_adapter if draw else layer.plan_adapter
        adapter = make(config.for_module(target.plain), **where)
        latest[role] = adapter
        made.append((target, layer, adapter))
    for _, layer, adapter in made:
        real = _materialised(adapter, layer, real)
    return made


def _layer_for(target: Target) -> AdapterLayer:
    layer = target.linear
    if isinstance(layer, AdapterLayer):
        return layer
    trained = [p for p in layer.parameters() if p.requires_grad]
    layer = with_adapters(layer, _layer_type(layer))
    for parameter in trained:  # who freezes it does so once everything is known to fit
        parameter.requires_grad_(True)
    return layer


def _materialised(adapter: Adapter, layer: AdapterLayer, real: dict[int, Tensor]) -> dict[int, Tensor]:
    """Gives the tensors of an adapter that are on the meta device memory where the layer is.

    What follows from its settings has values already, and moves there.
    """
    for module in adapter.modules():
        for name in module._non_persistent_buffers_set:
            module._buffers[name] = module._buffers[name].to(layer.base_weight.device)
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.is_meta and layer.base_weight.device.type != "meta":
                    if id(tensor) not in real:
                        empty = torch.empty_like(tensor, device=layer.base_weight.device)
                        is_one = isinstance(tensor, nn.Parameter)
                        real[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_one else empty
                    table[name] = real[id(tensor)]
    return real


def _install(site: Target, layer: nn.Module) -> None:
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


def find_sites(
    model: nn.Module, config: LoRAConfig, kinds: tuple[type[nn.Module], ...] | None = None
) -> list[Target]:
    """The layers that ``config`` targets: linears alone where it says "all-linear", else any of ``kinds``.

    Without ``kinds`` these are all that an adapter can be put on.

    Raises:
        ValueError: there are none, or a named target is not plainly of one of ``kinds``.
    """
    if config.target_modules is None:
        raise ValueError(f"target_modules: expected names, an expression or {ALL_LINEAR!r}, got None")
    called = kinds is not None or METHODS[config.method].reads_x  # else a weight is enough
    reads = {i: read for i, read in weight_reads(model).items() if not read.called} if called else {}
    refusal = partial(_why_not, kinds=kinds, reads=reads)
    everything, listed = _is_all_linear(config), isinstance(config.target_modules, list)
    kinds = tuple(layer_types()) if kinds is None else kinds
    wanted = tuple(kind for kind in kinds if kind in _linear_types()) if everything else kinds
    skipped = _output_head(model) if everything else None
    inside = inside_adapters(model)
    sites: dict[int, Target] = {}
    refused: dict[str, str] = {}
    plain, saved = plain_names(model), owned.saved_modules(model, config)
    for name, module in model.named_modules(remove_duplicate=False):
        if not plain[name] or module is skipped or is_wrapper(module) or id(module) in inside:
            continue
        if owned.is_inside(name) or not _targets(config, plain[name], saved):
            continue
        reason = refusal(module) if _is_a(module, wanted) else _is_other(module, wanted)
        if reason is None:
            site = sites.setdefault(id(module), Target(name, module, [], plain[name]))
            parent, _, attribute = name.rpartition(".")
            site.places.append((model.get_submodule(parent), attribute))
        elif listed:
            raise ValueError(f"target_modules: {name!r} {reason}")
        elif _is_a(module, wanted):
            refused[name] = reason
    if not sites:
        raise ValueError(_no_match(model, config, refused))
    if refused:
        warnings.warn(f"target_modules: left as they are, {_named(refused)}", stacklevel=3)
    _warn_of_strays(config, [site.plain for site in sites.values()])
    return list(sites.values())


def _is_a(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether ``module`` is of one of ``kinds`` or of a subclass, or that with adapters."""
    if isinstance(module, AdapterLayer):
        return issubclass(module.base_type, kinds)
    ours = type(module).__module__.startswith(_OURS)  # a mixture, a layer of a pool: no plain linears
    return type(module) in kinds or (isinstance(module, kinds) and not ours)


def _is_other(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str:
    kind, known = type(module), {one.__name__: one for one in layer_types()}
    namesake = known.get(kind.__name__, kind) is not kind
    shown = f"{kind.__module__}.{kind.__name__}" if namesake else kind.__name__
    return f"is of type {shown}, not a plain {_kinds_in_words(kinds)}"


def _kinds_in_words(kinds: tuple[type[nn.Module], ...]) -> str:
    return " or ".join(f"nn.{one.__name__}" for one in kinds if one.__module__.startswith("torch."))


def _why_not(
    module: nn.Module, kinds: tuple[type[nn.Module], ...] | None, reads: dict[int, Reads]
) -> str | None:
    """Why ``module`` can have no adapter, or where ``kinds`` are given be no layer of another sort."""
    base = module.base_type if isinstance(module, AdapterLayer) else type(module)
    if kinds is not None and base not in kinds:
        return f"is of type {base.__name__}, not a plain {_kinds_in_words(kinds)}"
    if id(module) in reads:
        return f"is not called: {reads[id(module)]}"
    if isinstance(module, (AdapterLayer, QuantizedLinear)):
        return None
    reason = why_no_layer(module, _layer_type(module))
    return reason and f"cannot be adapted: {reason}"


def _named(refused: dict[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in refused.items()]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _is_all_linear(config: LoRAConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def _targets(config: LoRAConfig, name: str, saved: Sequence[str]) -> bool:
    """PEFT's rule: exclusions first, modules saved whole next, then the targets."""
    if config.exclude_modules and _matches(config.exclude_modules, name):
        return False
    if any(name == one or name.startswith(f"{one}.") for one in saved):
        return False
    return _is_all_linear(config) or (_matches(config.target_modules, name) and _in_layers(config, name))


def _in_layers(config: LoRAConfig, name: str) -> bool:
    """PEFT's rule: the first number in the name, or the one behind a name of ``layers_pattern``.

    A linear whose whole dotted name is listed is meant whatever its number.
    """
    numbers = config.layers_to_transform
    if numbers is None or numbers == [] or name in (config.target_modules or ()):
        return True
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in config.layers_pattern or ()]
    found = (re.match(pattern, name) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."])
    first = next((match for match in found if match), None)
    return first is not None and int(first[1]) in ([numbers] if isinstance(numbers, int) else numbers)


def _matches(names: list[str] | str | None, name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in names or ())


def _output_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a Transformers model, which "all-linear" leaves out."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _no_match(model: nn.Module, config: LoRAConfig, refused: dict[str, str]) -> str:
    if refused:
        return f"target_modules: {config.target_modules!r} matches {_named(refused)}"
    names = [name for name, module in model.named_modules() if name and isinstance(module, _linear_types())]
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"
    return f"target_modules: {config.target_modules!r} matches no nn.Linear of the model; it has {shown}"


def _warn_of_strays(config: LoRAConfig, found: list[str]) -> None:
    if not isinstance(config.target_modules, list):
        return
    strays = [one for one in config.target_modules if not any(_matches([one], name) for name in found)]
    if strays:
        warnings.warn(f"target_modules: no linear is named {', '.join(strays)}", stacklevel=4)


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes ``model`` but for its active adapters, what they own, and the biases asked for.

    Args:
        model: a model with :class:`LoRALinear` layers.
        bias: ``"none"``, ``"all"``, or ``"lora_only"`` for those of the adapted linears: those that act now,
            whoever owns them.

    Raises:
        ValueError: no such ``bias``.
    """
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias: expected 'none', 'all' or 'lora_only', got {bias!r}")
    for parameter in model.parameters():
        parameter.requires_grad = False  # the method is not for a lazy layer's
    for layer in lora_layers(model).values():
        for name, adapter in layer.adapters.items():
            adapter.set_trainable(name in layer.active)
        own_bias = getattr(layer, "bias", None)
        if bias == "lora_only" and own_bias is not None:
            own_bias.requires_grad_(True)
    inside = adapter_keys(model)
    for name, parameter in model.named_parameters():
        if bias == "all" and name.rpartition(".")[2] == "bias" and not plain_key(name).startswith(inside):
            parameter.requires_grad_(True)
    owned.choose(model, owned.acting(model))


def lora_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """The part of ``model.state_dict()`` that fine-tuning made, under the same keys.

    Adapter parameters are ``<layer>.adapters.<adapter name>.<parameter>``; with them come the biases and the
    ``modules_to_save`` that the adapter owns: under the model's own names where they act, and else under
    ``<module>.lora_owned.<adapter name>``. ``model.load_state_dict(…, strict=False)`` takes it back where the
    same adapters are active.

    Args:
        model: a model with :class:`LoRALinear` layers.
        adapter_name: one adapter; by default all of them.

    Raises:
        ValueError: no layer has that adapter.
    """
    if adapter_name is not None:
        _check_adapters(lora_layers(model), (adapter_name,))
    names = lora_configs(model) if adapter_name is None else (adapter_name,)
    # FSDP1's state dict leaves its wrappers out of the names.
    own = {plain_key(key) for name in names for key in owned.state_keys(model, name).values()}
    prefixes = adapter_keys(model)
    inside = prefixes if adapter_name is None else tuple(f"{prefix}{adapter_name}." for prefix in prefixes)

    def wanted(key: str) -> bool:
        return plain_key(key).startswith(inside) or plain_key(key) in own

    return {key: value for key, value in model.state_dict().items() if wanted(key)}


def adapter_keys(model: nn.Module) -> tuple[str, ...]:
    """What the plain keys of adapters in the state dict of ``model`` start with, by name of each layer."""
    modules = model.named_modules(remove_duplicate=False)
    layers = [name for name, module in modules if isinstance(module, AdapterLayer)]
    return tuple(f"{plain_key(name)}.adapters." if name else "adapters." for name in layers)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints both counts of :func:`count_parameters` and their ratio."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / max(total, 1)
    print(f"trainable parameters: {trainable:,} of {total:,} ({share:.4f}%)")


def _check_adapters(layers: dict[str, AdapterLayer], names: Iterable[str]) -> None:
    known = dict.fromkeys(name for layer in layers.values() for name in layer.adapters)
    for name in names:
        if name not in known:
            raise ValueError(f"adapter: expected one of {', '.join(known) or 'none'}, got {name!r}")


def set_adapter(model: nn.Module, names: str | Iterable[str]) -> None:
    """Makes these adapters the active ones in every layer that has them, and inactive all others.

    What the adapters own beside it, ``modules_to_save`` and trained biases, acts with them.

    Raises:
        ValueError: no layer has an adapter of that name, or several own parameters of one module.
        RuntimeError: a layer is merged, or FSDP2 has taken over parameters that would be switched.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    layers = lora_layers(model)
    _check_adapters(layers, names)
    owned.check_choice(model, names)
    for layer in layers.values():
        layer._must_be_unmerged("choose other adapters")
    for layer in layers.values():
        layer.set_adapter([name for name in names if name in layer.adapters])
    owned.choose(model, names)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forgets the adapter ``name`` with all that it owns; others that were active remain so.

    Raises:
        ValueError: no layer has an adapter of that name.
        RuntimeError: it is merged.
    """
    layers = {at: layer for at, layer in lora_layers(model).items() if name in layer.adapters}
    _check_adapters(layers, (name,))
    for layer in layers.values():
        if name in layer.merged:
            layer._must_be_unmerged(f"delete {name!r}")
    combined = is_combined(model)
    for layer in layers.values():
        layer.delete_adapter(name)
    owned.forget(model, name)
    if combined:
        _combine(model)
    expose_weights(model)
    _open_calls(model)
    vars(unwrapped(model)).get(_CONFIGS, {}).pop(name, None)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block ``model`` computes what its base does."""
    resume = owned.suspend(model)
    with contextlib.ExitStack() as scope:
        scope.callback(resume)
        for layer in lora_layers(model).values():
            scope.enter_context(layer.disable_adapters())
        yield


def merge_adapters(model: nn.Module) -> None:
    """Merges every layer's active adapters into its weight; see :meth:`LoRALinear.merge`."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_adapters(model: nn.Module) -> None:
    """Undoes :func:`merge_adapters`, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove_lora(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Puts the base layer back wherever there is one with adapters.

    The base parameters are the original ones and stay frozen. With ``merge`` the layers carry the active
    adapters in new weights, and what these own stays in the model.
    """
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
    _open_calls(model)
    vars(unwrapped(model)).pop(_CONFIGS, None)
    return model


def quantize_base(
    model: nn.Module,
    format: str = "nf4",
    target_modules: list[str] | str = "all-linear",
    exclude_modules: list[str] | str | None = None,
    **options: Any,
) -> nn.Module:
    """Replaces the base weights of the targeted linears of ``model`` in place by quantised ones.

    An ``nn.Linear`` becomes a :class:`QuantizedLinear`, a :class:`LoRALinear` keeps its adapters as a
    :class:`QuantizedLoRALinear`; what is quantised already stays as it is. Follow with :func:`apply_lora`
    for QLoRA (arXiv 2305.14314). A weight that something else shares stays dense there.

    Args:
        model: any module that contains linears.
        format: ``nf4``, ``int8`` or ``fp8``.
        target_modules: as in :class:`LoRAConfig`; ``all-linear`` leaves the output head out.
        exclude_modules: as in :class:`LoRAConfig`.
        options: of :func:`lora_kernels.quantize`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing matches, or a match cannot be quantised (merged, DoRA). The model is then as it
            was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    config = LoRAConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    sites = find_sites(model, config, LINEARS)
    done = (QuantizedLinear, QuantizedLoRALinear)
    made = [
        (site, _quantized_layer(site, format, options)) for site in sites if not isinstance(site.linear, done)
    ]
    for site, layer in made:
        _install(site, layer)
    if fused_mlps(model):  # of dense layers, some of which are no longer there
        fuse_mlps(model)
    return model


def _quantized_layer(site: Target, format: str, options: dict[str, Any]) -> nn.Module:
    linear = site.linear
    try:
        if owned.CHILD in linear._modules:
            raise ValueError("an adapter owns a version of its weight or bias, which has to stay dense")
        if isinstance(linear, LoRALinear):
            return QuantizedLoRALinear.from_dense(linear, format, **options)
        return QuantizedLinear.from_linear(linear, format, **options)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None
