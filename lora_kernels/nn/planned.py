"""An adapter for a whole model that is made and checked before anything of the model changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._messages import each
from ..adapters import Adapter, LoRAConfig
from . import owned
from .adapter_layer import AdapterLayer
from .exposed import with_adapters
from .invocation import check_invocation
from .lora_experts import experts_with_adapters
from .sites import Target, find_parameter_sites, find_sites, layer_type
from .token_sites import find_token_sites
from .wrappers import check_whole

# Plain name of a layer -> name of a statistic -> tensor.
Statistics = Mapping[str, Mapping[str, Tensor]]


class PlannedAdapter(NamedTuple):
    """An adapter that is not yet there: its part of each layer, and the tensors of the model that it owns."""

    layers: list[tuple[Target, AdapterLayer, Adapter]]
    owned: dict[owned.Place, Tensor]
    trained: tuple[owned.Place, ...]


def plan_adapter(
    model: nn.Module, config: LoRAConfig, *, draw: bool = True, statistics: Statistics | None = None
) -> PlannedAdapter:
    """What :func:`apply_lora` would add; the model stays as it is.

    Without ``draw`` all new tensors are memory that nobody wrote to.

    Raises:
        TypeError: a wrong type.
        ValueError: as :func:`apply_lora`, but for the name.
        RuntimeError: FSDP2 has taken over layers that have no adapter yet.
    """
    check_types(model, config)
    if statistics is not None and not isinstance(statistics, Mapping):
        raise TypeError(f"statistics: expected those of calibrate, got {type(statistics).__name__}")
    check_invocation(model, config)
    sites = _all_sites(model, config)
    if not all(isinstance(site.linear, AdapterLayer) for site in sites):
        check_whole(model, "add an adapter")
    layers = _prepare_all(sites, config, draw, statistics or {})
    adapted = {site.linear: layer for site, layer, _ in layers}
    if config.ensure_weight_tying:
        _check_ties(model, {site.linear: layer for site, layer, _ in layers if site.rows is None})
    places = tuple(owned.config_places(model, config, adapted))
    return PlannedAdapter(layers, owned.copies(places, config.ensure_weight_tying, draw), places)


def _all_sites(model: nn.Module, config: LoRAConfig) -> list[Target]:
    """The targeted modules, and those of targeted parameters."""
    alone = config.target_parameters and not config.target_modules
    modules = [] if alone else find_sites(model, config)
    parameters = find_parameter_sites(model, config) if config.target_parameters else []
    both = {id(site.linear) for site in modules}
    for site in parameters:
        if id(site.linear) in both:
            raise ValueError(f"target_parameters: {site.plain} is among the target_modules too")
    if config.trainable_token_indices:
        parameters += find_token_sites(model, config, [site.linear for site in modules])
    return [*modules, *parameters]


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


def check_types(model: nn.Module, config: LoRAConfig) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config: expected a LoRAConfig, got {type(config).__name__}")


def _prepare_all(
    targets: list[Target], config: LoRAConfig, draw: bool, statistics: Statistics
) -> list[tuple[Target, AdapterLayer, Adapter]]:
    """The layer for each target and its new adapter, nothing yet changed."""
    tensors: dict[Any, nn.Parameter] = {}
    latest: dict[str, Adapter] = {}
    real: dict[int, Tensor] = {}
    made = []
    for target in each("adapters", targets):
        role = target.plain.rpartition(".")[2]
        where: dict[str, Any] = {"name": target.plain, "tensors": tensors, "previous": latest.get(role)}
        where["statistics"] = statistics.get(target.plain, {})
        if target.parameters:
            where["parameters"] = target.parameters
        if target.rows:
            where["rows"] = target.rows
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
    made = experts_with_adapters(layer) if target.parameters else with_adapters(layer, layer_type(layer))
    for parameter in trained:  # who freezes it does so once everything is known to fit
        parameter.requires_grad_(True)
    return made


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
