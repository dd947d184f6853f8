"""What an adapter owns beside its factors: parameters of the model itself, in a version of its own.

Modules trained whole (``modules_to_save``), trained biases, and base tensors that came with a checkpoint are
the adapter's: they act while it is the active one, and at no other time. A module of which an adapter owns
something holds a child ``lora_owned`` with the versions that do not act now, the model's own among them; the
one that acts stands where the module keeps its parameters, under the names it always had. So nothing changes
in the way the model is called, and whatever moves, casts or copies it takes every version along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..adapters import LoRAConfig
from .adapter_layer import inside_adapters
from .wrappers import fully_sharded, plain_names

CHILD = "lora_owned"
# The version of the model itself.
BASE = "__base__"
# Where a merged layer keeps its own.
_MERGED = {"weight": "_unmerged", "bias": "_unmerged_bias"}
# A module and the name of one of its own parameters or buffers.
Place = tuple[nn.Module, str]


class _Version(nn.Module):
    """Tensors of one owner, while they do not act."""


class _Owned(nn.Module):
    """The versions of a module's tensors that do not act, by owner, and who owns those that do."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(BASE, _Version())
        self.owner = BASE
        # Of each owner: the names of its tensors, and those of them that it trains.
        self.names: dict[str, tuple[str, ...]] = {}
        self.trained: dict[str, tuple[str, ...]] = {}

    def extra_repr(self) -> str:
        """Whose tensors act."""
        return f"owner={self.owner}"


def is_inside(name: str) -> bool:
    """Whether a dotted name leads into a version that does not act."""
    return CHILD in name.split(".")


def _holder(module: nn.Module) -> Any:
    holder = module._modules.get(CHILD)
    return holder if isinstance(holder, _Owned) else None


def _held(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    for name, module in list(model.named_modules()):
        if _holder(module) is not None:
            yield name, module, _holder(module)


def base_tensor(place: Place) -> Tensor:
    """The model's own tensor at a place, whoever's acts there."""
    module, name = place
    holder = _holder(module)
    if holder is not None and holder.owner != BASE and name in holder.names[holder.owner]:
        return _get(holder._modules[BASE], name)
    if name == "weight" and getattr(module, "_taking", False):  # an adapter has its start out of it
        return _get(module, "_other_weight")
    unmerged = module._buffers.get(_MERGED[name]) if name in _MERGED else None
    return _get(module, name) if unmerged is None else unmerged


@contextlib.contextmanager
def set_apart(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Inside the ``with`` block a module is without its versions that do not act, which it yields."""
    holder = module._modules.pop(CHILD, None) if _holder(module) is not None else None
    try:
        yield list(holder.children()) if holder is not None else []
    finally:
        if holder is not None:
            module._modules[CHILD] = holder


def owned_tensors(model: nn.Module, owner: str) -> dict[tuple[str, str], Tensor]:
    """What an adapter owns, by the dotted name of the module and the name in it."""
    return {
        (at, name): _get(module if holder.owner == owner else holder._modules[owner], name)
        for at, module, holder in _held(model)
        for name in holder.names.get(owner, ())
    }


def places(model: nn.Module, owner: str) -> dict[Place, Tensor]:
    """What an adapter owns, by the module and the name in it."""
    return {
        (module, name): _get(module if holder.owner == owner else holder._modules[owner], name)
        for _, module, holder in _held(model)
        for name in holder.names.get(owner, ())
    }


def state_keys(model: nn.Module, owner: str) -> dict[tuple[str, str], str]:
    """The keys that :func:`owned_tensors` have in the model's state dict now."""
    return {
        (at, name): ".".join(filter(None, (at, *(() if holder.owner == owner else (CHILD, owner)), name)))
        for at, _, holder in _held(model)
        for name in holder.names.get(owner, ())
    }


def copies(places: Iterable[Place], tied: bool, fill: bool = True) -> dict[Place, Tensor]:
    """New tensors like the model's own at these places; with ``tied``, one for all that share one."""
    made: dict[Any, Tensor] = {}
    found = {}
    for place in places:
        base = base_tensor(place)
        key: Any = id(base) if tied else place
        if key not in made:
            data = base.detach().clone() if fill else base.detach().new_empty(base.shape)
            made[key] = nn.Parameter(data, False) if isinstance(base, nn.Parameter) else data
        found[place] = made[key]
    return found


def add(owner: str, tensors: Mapping[Place, Tensor], trained: Iterable[Place]) -> None:
    """Gives an adapter its versions of what stands at these places. They do not act until :func:`choose`."""
    trained = set(trained)
    for module in dict.fromkeys(module for module, _ in tensors):
        own = {name: tensor for (where, name), tensor in tensors.items() if where is module}
        holder = _holder(module)
        if holder is None:
            holder = _Owned()
            holder.train(module.training)
            module.add_module(CHILD, holder)
        version = _Version()
        for name, tensor in own.items():
            _put(version, name, tensor)
            base_tensor((module, name)).requires_grad_(False)
        holder.add_module(owner, version)
        holder.names[owner] = tuple(own)
        holder.trained[owner] = tuple(
            name
            for name, t in own.items()
            if (module, name) in trained and isinstance(t, nn.Parameter) and t.is_floating_point()
        )


def check_choice(model: nn.Module, names: Iterable[str]) -> None:
    """Whether what the adapters ``names`` own can act.

    Raises:
        ValueError: two of them own something of one module.
        RuntimeError: FSDP2 has taken over the parameters, or a merged layer holds one of them.
    """
    names = tuple(names)
    for at, module, holder in _held(model):
        several = [name for name in holder.names if name in names]
        if len(several) > 1:
            raise ValueError(
                f"adapter: expected one of {', '.join(several)}, which have each a version of {at!r}"
                f" of their own, got {len(several)}"
            )
        if _owner_among(holder, names) != holder.owner:
            _check_free(model, at, module, holder)


def _check_free(model: nn.Module, at: str, module: nn.Module, holder: Any) -> None:
    for name, kept in _MERGED.items():
        owns = any(name in names for names in holder.names.values())
        if owns and module._buffers.get(kept) is not None:
            raise RuntimeError(f"cannot switch the {name} of {at!r} while it is merged; call unmerge() first")
    if fully_sharded(model):
        raise RuntimeError(
            f"cannot switch the parameters of {at!r} that an adapter owns after fully_shard took them over;"
            " choose the adapter before"
        )


def choose(model: nn.Module, names: Iterable[str]) -> None:
    """Lets what the adapters ``names`` own act and train, and nothing that another one does.

    Raises:
        ValueError: as :func:`check_choice`.
        RuntimeError: as :func:`check_choice`.
    """
    names = tuple(names)
    check_choice(model, names)
    for _, module, holder in _held(model):
        for name in holder.trained.get(holder.owner, ()):
            _get(module, name).requires_grad_(False)
        _switch(module, holder, _owner_among(holder, names))
        for name in holder.trained.get(holder.owner, ()):
            _get(module, name).requires_grad_(True)


def _owner_among(holder: Any, names: Iterable[str]) -> str:
    return next((name for name in holder.names if name in names), BASE)


def _switch(module: nn.Module, holder: Any, owner: str) -> None:
    """Exchanges the tensors that act for those of ``owner``."""
    for leaving, entering in ((holder.owner, BASE), (BASE, owner)):
        if leaving != entering:
            named = holder.names[leaving if entering == BASE else entering]
            for name in named:
                _put(holder._modules[leaving], name, _get(module, name))
                _put(module, name, _take(holder._modules[entering], name))
    holder.owner = owner


def suspend(model: nn.Module) -> Callable[[], None]:
    """Lets the model's own act; what this returns lets act again what did.

    Raises:
        RuntimeError: as :func:`check_choice`.
    """
    check_choice(model, ())
    before = [(module, holder, holder.owner) for _, module, holder in _held(model)]
    for module, holder, _ in before:
        _switch(module, holder, BASE)

    def resume() -> None:
        for module, holder, owner in before:
            if owner in holder.names or owner == BASE:
                _switch(module, holder, owner)

    return resume


def acting(model: nn.Module) -> set[str]:
    """The adapters of whose versions any acts."""
    return {holder.owner for _, _, holder in _held(model)} - {BASE}


def forget(model: nn.Module, owner: str) -> None:
    """Takes away what an adapter owns; the model's own acts where it did."""
    for _, module, holder in _held(model):
        if owner in holder.names:
            _switch(module, holder, BASE if holder.owner == owner else holder.owner)
            del holder._modules[owner], holder.names[owner], holder.trained[owner]
        if not holder.names:
            del module._modules[CHILD]


def settle(model: nn.Module, keep: bool) -> None:
    """Removes every version but one: with ``keep`` what acts now, else the model's own. It is frozen."""
    for _, module, holder in _held(model):
        if not keep:
            _switch(module, holder, BASE)
        for name in holder.trained.get(holder.owner, ()):
            _get(module, name).requires_grad_(False)
        del module._modules[CHILD]


def own_tensors(module: nn.Module) -> Iterator[str]:
    """The names of a module's own parameters and persistent buffers."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name


def config_places(
    model: nn.Module, config: LoRAConfig, adapted: Mapping[nn.Module, nn.Module]
) -> dict[Place, None]:
    """Where ``config`` lets an adapter own something: the modules to save, the biases to train.

    ``adapted``: the layers that the adapter is put on, and what takes the place of each.
    """
    saved, plain = saved_modules(model, config), plain_names(model)
    places: dict[Place, None] = {}
    inside = inside_adapters(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if is_inside(name) or id(module) in inside:
            continue
        whole = any(plain[name] == one or plain[name].startswith(f"{one}.") for one in saved)
        bias = config.bias == "all" or (config.bias == "lora_only" and module in adapted)
        for own in own_tensors(module):
            if whole or (own == "bias" and bias):
                places[adapted.get(module, module), own] = None
    return _with_tied(model, places) if config.ensure_weight_tying else places


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The modules that ``config`` saves whole, by PEFT's rule: their names end in what it lists.

    Raises:
        ValueError: there are none.
    """
    wanted = config.modules_to_save or []
    plain, inside = plain_names(model), inside_adapters(model)
    modules = list(model.named_modules(remove_duplicate=False))
    names = [plain[name] for name, _ in modules if plain[name] and not is_inside(name)]
    own = {plain[name] for name, module in modules if id(module) in inside}
    found = [name for name in names if any(name.endswith(one) for one in wanted)]
    if wanted and not found:
        raise ValueError(f"modules_to_save: no module's name ends in {' or '.join(map(repr, wanted))}")
    return [name for name in found if name not in own]


def _with_tied(model: nn.Module, places: dict[Place, None]) -> dict[Place, None]:
    """The places, and all others where the model has one of their tensors too."""
    shared = {id(base_tensor(place)) for place in places}
    return {**places, **dict.fromkeys(sharing(model, shared))}


def sharing(model: nn.Module, ids: set[int]) -> Iterator[Place]:
    """Every place of the model at which one of these tensors is its own."""
    for name, module in model.named_modules():
        if not is_inside(name):
            for own in own_tensors(module):
                if id(base_tensor((module, own))) in ids:
                    yield module, own


def _get(module: nn.Module, name: str) -> Tensor:
    tensor: Tensor | None = module._parameters.get(name)
    tensor = module._buffers.get(name) if tensor is None else tensor
    assert tensor is not None
    return tensor


def _take(version: nn.Module, name: str) -> Tensor:
    tensor = _get(version, name)
    version._parameters.pop(name, None)
    version._buffers.pop(name, None)
    return tensor


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(module, nn.RNNBase):
        setattr(module, name, tensor)  # which also files it among the weights that its forward reads
    else:
        table: dict[str, Any] = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        table[name] = tensor
