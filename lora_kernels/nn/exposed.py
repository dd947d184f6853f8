"""Layers with adapters whose weight others read without calling them: while those run, it is the adapted one.

So such a layer takes part, with the same gradients, and merged or not the model computes the same. At every
other time ``weight`` is the base parameter, for whoever initialises, ties, counts or saves it.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._messages import warn
from .adapter_layer import AdapterLayer
from .layer_weights import OWN, LayerWeights
from .made_classes import Made, make_class
from .weight_reads import weight_reads
from .wrappers import unwrapped

_local = threading.local()


def _open() -> Counter[int]:
    """How many running modules read each layer, by its id; of this thread."""
    return _local.__dict__.setdefault("open", Counter())


class _Exposed:
    """Comes before the class of a layer whose weight others read."""

    @property
    def weight(self: Any) -> Tensor:
        """The base parameter, or what the adapters make of it while somebody computes with it."""
        try:
            own = self._own_weight
        except KeyError:  # as the base layer builds itself
            raise AttributeError("weight") from None
        if not _is_read(self):
            return own
        if "_mixed" in vars(self):
            raise RuntimeError(
                f"{self._mixed}: its weight is read without a call, which no mixed batch can have"
            )
        return self.adapted_weight()


def _is_read(layer: Any) -> bool:
    """A compiler sees none but those who compute; a backward pass runs parts of a forward anew."""
    if torch.compiler.is_compiling():
        return True
    return _open()[id(layer)] > 0 or torch._C._current_graph_task_id() != -1


class _OwnForward:
    """Comes before a class of somebody's own with its forward, on top of a layer with adapters.

    That forward either calls the forward below it, which is the layer's, or computes with ``weight``.
    """

    plain_forward = False
    group_member = None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the class of the base layer computes."""
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        counts = _open()
        counts[id(self)] += 1
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            counts[id(self)] -= 1


@functools.cache
def layer_class(layer: Any, base: Any, exposed: bool, own_forward: bool) -> Any:
    """The class for a ``base`` with the adapters of ``layer``, whose ``base_type`` it is or extends.

    A subclass with its ``own_forward`` comes before the layer: where that calls the forward of its base it
    gets the one with adapters.
    """
    kinds = (layer,) if base is layer.base_type else (base, layer) if own_forward else (layer, base)
    bases = (*[_OwnForward] * own_forward, *[_Exposed] * (exposed or own_forward), *kinds)
    if bases == (layer,):
        return layer
    return make_class(layer, bases, (layer_class, layer, base, exposed, own_forward), base_type=base)


def with_adapters(module: nn.Module, layer: Any) -> Any:
    """A ``layer`` without adapters on the very parameters of ``module``, of its base type or a subclass."""
    kind: Any = type(module)
    return layer_class(layer, kind, False, _has_own_forward(module, layer.base_type))._share(module)


def _has_own_forward(module: Any, base_type: Any) -> bool:
    """Whether a subclass computes something else than its base type."""
    if type(module).forward is base_type.forward:
        return False
    return base_type is not nn.Linear or not _is_linear(module)


@torch.no_grad()
def _is_linear(module: Any) -> bool:
    """Whether a forward is that of a linear in other words: it has no other state, and the same output."""
    if (
        vars(module).keys() - vars(nn.Linear(1, 1, device="meta")).keys()
        or module._buffers
        or module._modules
    ):
        return False
    weight, bias = module.weight, module._parameters.get("bias")
    if weight.is_meta or module._parameters.keys() - {"weight", "bias"}:
        return False
    x = torch.linspace(-3, 3, 2 * weight.shape[1]).cos().view(2, -1).to(weight)
    try:
        got, want = module.forward(x), nn.functional.linear(x, weight, bias)
    except Exception:  # whatever it wants instead
        return False
    close = 64 * torch.finfo(weight.dtype).eps * want.abs().amax()
    return got.shape == want.shape and bool((got - want).abs().amax() <= close)


def why_no_layer(module: nn.Module, layer: Any) -> str | None:
    """Why ``layer`` cannot take the place of ``module``, of its base type or a subclass, or ``None``."""
    if "forward" in vars(module):
        return "its forward was replaced"
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        return (
            "its weight is no parameter but made anew at every call (weight_norm, a parametrisation, pruning)"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not there before the first call"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if _has_own_forward(module, layer.base_type) and type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    clash = _own_names(module, layer.base_type) & _names_of(layer)
    return f"it has {', '.join(sorted(clash))} of its own" if clash else None


def _own_names(module: nn.Module, base_type: type) -> set[str]:
    """What a subclass and its instance define beyond the base type."""
    kinds = [kind for kind in type(module).__mro__ if kind not in base_type.__mro__]
    return {name for kind in kinds for name in vars(kind)} | set(vars(module)) | set(module._modules)


@functools.cache
def _names_of(layer: Any) -> frozenset[str]:
    """What the layers with adapters need under their names."""
    kinds = [kind for kind in layer.__mro__ if issubclass(kind, LayerWeights)]
    names = {name for kind in kinds for name in vars(kind) if not name.startswith(("__", "from_", "to_"))}
    return frozenset(names | {*OWN}) - {"in_features", *dir(layer.base_type)}


def _below(reader: nn.Module, name: str) -> nn.Module:
    """The layer of a name that leaves out wrappers."""
    for part in name.split("."):
        reader = unwrapped(reader.get_submodule(part))
    return reader


class _Opens:
    """The forward pre-hook of a module that reads weights below it."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, reader: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling():
            layers = [id(_below(reader, name)) for name in self.names]
            _open().update(layers)
            _local.__dict__.setdefault("running", []).append((id(reader), layers))


def _close(reader: nn.Module, *args: object) -> None:
    """Its forward hook, called after an exception too."""
    if torch.compiler.is_compiling():
        return
    running = _local.__dict__.get("running", [])
    while any(one == id(reader) for one, _ in running):
        ended, layers = running.pop()
        _open().subtract(layers)
        if ended == id(reader):
            return


def expose_weights(model: nn.Module) -> list[str]:
    """Lets the layers with adapters whose weight others read take part; returns their names.

    Readers are found in the source of the forwards; calling it again finds them anew, for example after
    a forward was replaced. Where a loss outside of every forward takes ``layer.weight``, give it
    ``layer.adapted_weight()``.
    """
    hide_weights(model)
    reads = weight_reads(model)
    exposed = {}
    names: dict[nn.Module, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLayer) and id(layer) in reads and isinstance(layer._own_weight, Tensor):
            exposed[name] = layer
            _expose(layer)
            for reader, path in reads[id(layer)].by:
                names.setdefault(reader, []).append(path)
    for reader, paths in names.items():
        reader.register_forward_pre_hook(_Opens(tuple(paths)))
        reader.register_forward_hook(_close, always_call=True)
    _warn_of_dropout({name: layer for name, layer in exposed.items() if not reads[id(layer)].called}, reads)
    return list(exposed)


def _expose(layer: Any) -> None:
    if not isinstance(layer, _Exposed):
        kind = type(layer)
        made = kind._lk_made_by[1:] if issubclass(kind, Made) else (kind, kind.base_type, False, False)
        layer.__class__ = layer_class(*made[:2], True, made[3])


def _warn_of_dropout(layers: dict[str, AdapterLayer], reads: dict[int, Any]) -> None:
    for name, layer in layers.items():
        if any(adapter.lora_dropout for adapter in layer.adapters.values()):
            warn(f"lora_dropout: does nothing in {name}, as {reads[id(layer)]}")


def hide_weights(model: nn.Module) -> None:
    """Undoes :func:`expose_weights`, but for the layers' classes."""
    for module in model.modules():
        for hooks, ours in ((module._forward_pre_hooks, _is_opens), (module._forward_hooks, _is_close)):
            for key, hook in list(hooks.items()):
                if ours(hook):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


def _is_opens(hook: object) -> bool:
    return type(hook) is _Opens


def _is_close(hook: object) -> bool:
    return hook is _close
