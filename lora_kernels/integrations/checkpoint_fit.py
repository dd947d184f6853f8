"""Which tensor of a file goes where in an adapter that is planned for a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..init import GIVEN
from ..nn import owned
from ..nn.planned import PlannedAdapter
from ..nn.wrappers import plain_names
from .checkpoint_keys import factor_key, factor_shape, model_name, owned_key


class Slot(NamedTuple):
    """A tensor of an adapter: the module and its name there, its possible keys in a file, its shape there."""

    at: str
    name: str
    keys: tuple[str, ...]
    shape: torch.Size
    target: Tensor


def fitted(
    model: nn.Module, plan: PlannedAdapter, tensors: Mapping[str, Tensor], source: Any
) -> tuple[PlannedAdapter, list[Slot]]:
    """The plan, with what the file has beside it, and where each of the file's tensors goes.

    Raises:
        ValueError: a tensor is missing, is not known, or is of another shape or dtype.
    """
    slots = _slots(model, plan)
    known = {key for slot in slots for key in slot.keys}
    beside = _beside(model, [key for key in tensors if key not in known])
    missing = sorted(slot.keys[0] for slot in slots if not any(key in tensors for key in slot.keys))
    unknown = sorted(tensors.keys() - known - beside.keys())
    if missing or unknown:
        raise ValueError(
            f"{source}: expected the adapter's {len(slots)} tensors, got {len(missing)} missing"
            f" {missing[:3]} and {len(unknown)} unknown {unknown[:3]}"
        )
    more = [Slot("", "", (key,), base.shape, base) for key, (_, base) in beside.items()]
    for slot in (*slots, *more):
        _check_tensor(slot, tensors, source)
    versions = _base_versions(model, plan, tensors, beside)
    names = _names(model, plan)
    slots += [
        Slot(names[module][0], name, (key,), version.shape, version)
        for (module, name), (key, version) in versions.items()
    ]
    own = {place: version for place, (_, version) in versions.items()}
    return plan._replace(owned={**plan.owned, **own}), slots


def value_of(slot: Slot, tensors: Mapping[str, Tensor]) -> Tensor:
    """The file's tensor for a slot, in the slot's own shape."""
    return next(tensors[key] for key in slot.keys if key in tensors).reshape(slot.target.shape)


def _check_tensor(slot: Slot, tensors: Mapping[str, Tensor], source: Any) -> None:
    for key in slot.keys:
        got = tensors.get(key)
        if got is None:
            continue
        floating = slot.target.is_floating_point()
        kind = "floating" if floating else str(slot.target.dtype)
        fits = got.is_floating_point() if floating else got.dtype == slot.target.dtype
        if got.shape != slot.shape or not fits:
            sized = not slot.name or "lora_embedding" in key
            hint = "; a model whose embeddings were resized has to be resized before" if sized else ""
            raise ValueError(
                f"{source}: {key}: expected a {kind} tensor of shape {tuple(slot.shape)},"
                f" got {got.dtype} {tuple(got.shape)}{hint}"
            )


def _slots(model: nn.Module, plan: PlannedAdapter) -> list[Slot]:
    """One for each tensor of the plan."""
    names, plain = _names(model, plan), plain_names(model)
    adapted: set[nn.Module] = {layer for _, layer, _ in plan.layers}
    shared: dict[int, Slot] = {}
    for _, layer, adapter in plan.layers:
        for name, tensor in adapter.state_dict(keep_vars=True).items():
            if name in GIVEN:  # the plan was made with them
                continue
            keys = tuple(factor_key(plain[one], layer, adapter, name) for one in names[layer])
            shape = factor_shape(layer, name, tensor.shape)
            first = shared.get(id(tensor), Slot(names[layer][0], name, (), shape, tensor))
            shared[id(tensor)] = first._replace(keys=(*first.keys, *keys))
    found = list(shared.values())
    for (module, name), tensor in plan.owned.items():
        # PEFT says "base_layer" where any adapter is, also another one.
        forms = (module in adapted, module not in adapted)
        keys = tuple(owned_key(plain[one], name, form) for one in names[module] for form in forms)
        found.append(Slot(names[module][0], name, keys, tensor.shape, tensor))
    return found


def _names(model: nn.Module, plan: PlannedAdapter) -> dict[nn.Module, list[str]]:
    """Every dotted name of each module, and of the planned layers those that they will have."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {**names, **{layer: names[site.linear] for site, layer, _ in plan.layers}}


def _beside(model: nn.Module, keys: Iterable[str]) -> dict[str, tuple[owned.Place, Tensor]]:
    """The keys that stand for a tensor of the model, with its place and the model's own tensor there."""
    by_plain = {plain: name for name, plain in plain_names(model).items()}
    found = {}
    for key in keys:
        at, name = model_name(key)
        module = model.get_submodule(by_plain[at]) if at in by_plain else None
        if module is not None and name in owned.own_tensors(module):
            found[key] = ((module, name), owned.base_tensor((module, name)))
    return found


def _base_versions(
    model: nn.Module,
    plan: PlannedAdapter,
    tensors: Mapping[str, Tensor],
    beside: Mapping[str, tuple[owned.Place, Tensor]],
) -> dict[owned.Place, tuple[str, Tensor]]:
    """Key and new tensor of each place whose base tensor the file has otherwise than the model.

    What shares a tensor in the model goes on sharing it.
    """
    layers = {site.linear: layer for site, layer, _ in plan.layers}
    found: dict[owned.Place, tuple[str, Tensor]] = {}
    for key, (first, base) in beside.items():
        if torch.equal(whole(base).cpu(), tensors[key].to(base.dtype)):
            continue
        version: Tensor = base.detach().new_empty(base.shape)
        version = nn.Parameter(version, False) if isinstance(base, nn.Parameter) else version
        for module, name in (first, *owned.sharing(model, {id(base)})):
            place = layers.get(module, module), name
            if place not in plan.owned:
                found.setdefault(place, (key, version))
    return found


def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, gathered from all processes; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
