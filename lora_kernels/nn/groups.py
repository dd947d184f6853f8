"""LoRA layers that a module's forward calls on one x: found by its source, computed together.

A group is found where the source of a parent's ``forward`` calls several LoRA children on the same
variable: ``self.q_proj(hidden_states)``, ``self.k_proj(hidden_states)``, ``self.v_proj(hidden_states)``.
While that forward runs, the first member called computes all of them in one call of
``lora_linear_group``, and the others hand out what is theirs if they are called on the very same tensor.
The model's source is left as it is, and a member that is called otherwise computes alone.

``torch.compile`` traces a twin of that forward instead, in which the outputs wait in a local variable.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .._arguments import LoraInputs
from ..ops.lora_linear import fused
from ..ops.lora_linear_group import fused_group
from ..quant import QuantizedWeight
from .forward_source import CannotRewrite, shared_inputs, source, twin
from .made_classes import make_class


def _groupable(layer: Any) -> bool:
    """A layer says what it computes for x in ``group_member(x)``: ``None`` if not one plain fused linear."""
    return callable(getattr(type(layer), "group_member", None))


class _Pending(NamedTuple):
    """Outputs that wait for their layers, and under what they were computed."""

    x: Tensor
    state: tuple[Any, ...]
    outputs: dict[Any, Tensor]


class _Scope:
    """One run of a parent's forward: its groups, and what waits in each."""

    def __init__(self, parent: nn.Module, groups: Iterable[tuple[str, ...]]) -> None:
        self.parent = parent
        self.groups = [[parent._modules.get(name) for name in names] for names in groups]
        self.pending: dict[int, _Pending] = {}

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's output from its group, or ``None`` where it has to compute alone."""
        for i, layers in enumerate(self.groups):
            if any(layer is one for one in layers):
                return self._take(i, layers, layer, x)
        return None

    def _take(self, i: int, layers: list[Any], layer: Any, x: Tensor) -> Tensor | None:
        waiting, state = self.pending.get(i), _state(layer, x)
        if waiting is not None and waiting.x is x and waiting.state == state:
            return waiting.outputs.pop(id(layer), None)
        own = _member_of(layer, x, layer.training)
        if own is None:
            return None
        others = ((one, _member_of(one, x, layer.training)) for one in layers if one is not layer)
        members = {id(layer): own} | {id(one): member for one, member in others if member is not None}
        if len(members) == 1:
            return fused(own)  # and not by the layer, which would ask the method a second time
        outputs = _computed(members)
        self.pending[i] = _Pending(x, state, outputs)
        return outputs.pop(id(layer))


def _state(layer: Any, x: Tensor) -> tuple[Any, ...]:
    """What has to be the same for an output to be the one that a later call would compute."""
    return None if x.is_inference() else x._version, *_settings(layer, x)


def _settings(layer: Any, x: Tensor) -> tuple[Any, ...]:
    """:func:`_state` but for the tensor's own."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return torch.is_grad_enabled(), autocast, layer.training


def _member_of(layer: Any, x: Tensor, training: bool) -> LoraInputs | None:
    """What the layer computes for x, or ``None`` where that is not for a group."""
    member = layer.group_member(x) if _groupable(layer) else None
    fits = member is not None and layer.training == training and _fits(layer, member, x)
    return member if fits else None


def _computed(members: dict[Any, LoraInputs]) -> dict[Any, Tensor]:
    """The members' outputs, in one call."""
    return dict(zip(members, fused_group(list(members.values())), strict=True))


def _fits(layer: Any, member: LoraInputs, x: Tensor) -> bool:
    """Whether the layer's parameters are there to be used before the layer itself is called."""
    weight = member.weight
    plain = type(weight) in (Tensor, nn.Parameter, QuantizedWeight) and not layer._forward_pre_hooks
    return (
        plain
        and "forward" not in vars(layer)
        and weight.device == x.device
        and weight.shape[1] == x.shape[-1]
    )


_local = threading.local()


def grouped(layer: Any, x: Tensor) -> Tensor | None:
    """The output of ``layer`` for ``x`` from its group, or ``None``: then the layer computes alone.

    What ``torch.compile`` traces of a group never gets here: see :func:`_member`.
    """
    if torch.compiler.is_compiling():
        return None
    scopes = getattr(_local, "scopes", None)
    return scopes[-1].take(layer, x) if scopes else None


class _Open:
    """The forward pre-hook of a parent: its groups wait from here to the end of its forward."""

    def __init__(self, groups: list[tuple[str, ...]], why_not_compiled: str | None) -> None:
        self.groups = groups
        self.why_not_compiled = why_not_compiled

    def __call__(self, parent: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling():
            _close(parent)  # what an interrupted forward left behind
            _local.scopes.append(_Scope(parent, self.groups))


def _close(parent: nn.Module, *args: object) -> None:
    """The forward hook of a parent, called after an exception too: what still waits is dropped."""
    if torch.compiler.is_compiling():
        return
    scopes = _local.__dict__.setdefault("scopes", [])
    for i, scope in enumerate(scopes):
        if scope.parent is parent:
            del scopes[i:]
            return


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def touched(module: nn.Module) -> bool:
    """Whether somebody listens to the module's calls, or has replaced its forward."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def _member(parent: Any, names: tuple[str, ...], name: str, x: Any, held: dict[Any, Any]) -> Any:
    """``parent.<name>(x)`` in the twin of a forward: from its group, where that is what a call would give."""
    layer = getattr(parent, name)
    if not isinstance(x, Tensor) or torch_module._has_any_global_hook():
        return layer(x)
    waiting, state = held.get(names), _settings(layer, x)
    if waiting is not None and waiting.x is x and waiting.state == state:
        y = waiting.outputs.pop(name, None)
        return layer(x) if y is None else y
    layers = {one: getattr(parent, one) for one in names}
    own = None if touched(layer) else _member_of(layer, x, layer.training)
    if own is None:
        return layer(x)
    others = {
        one: _member_of(sibling, x, layer.training)
        for one, sibling in layers.items()
        if one != name and not touched(sibling)
    }
    members = {name: own} | {one: member for one, member in others.items() if member is not None}
    if len(members) == 1:
        return fused(own)
    held[names] = _Pending(x, state, _computed(members))
    return held[names].outputs.pop(name)


class _Grouped:
    """Comes before the class of a parent in one made for it, whose forward has a twin for ``torch.compile``.

    A class and not an attribute of the instance: so the parent's copies run on their own children.
    """


@functools.cache
def _grouped_class(base: Any, groups: tuple[tuple[str, ...], ...], linears: tuple[str, ...]) -> Any:
    """The class of the parents that are a ``base`` with these groups, or why there is none."""
    original = base.forward
    try:
        compiled = twin(original, groups, linears, _member)
    except CannotRewrite as reason:
        return str(reason)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and base.forward is original and _is_open(self):
            return compiled(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    # The compiler counts and limits what it made of one code, so that each class has its own.
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]
    made_by = (_grouped_or_base, base, groups, linears)
    return make_class(base, (_Grouped, base), made_by, forward=forward)


def _grouped_or_base(base: Any, *rest: Any) -> Any:
    """The class of a pickle: the parent's own where this Python cannot make the other."""
    kind = _grouped_class(base, *rest)
    return base if isinstance(kind, str) else kind


def _is_open(parent: nn.Module) -> bool:
    return any(type(hook) is _Open for hook in parent._forward_pre_hooks.values())


def _let_compile(parent: Any, groups: list[tuple[str, ...]]) -> str | None:
    """Gives the parent its class for ``torch.compile``, or says why not."""
    if isinstance(parent, _Grouped):  # below a class that somebody put on top of it, FSDP2 for one
        return None
    linears = [n for n, child in parent.named_children() if _groupable(child) or type(child) is nn.Linear]
    base: Any = type(parent)
    kind = _grouped_class(base, tuple(groups), tuple(linears))
    if isinstance(kind, str):
        return kind
    try:
        parent.__class__ = kind
    except TypeError:
        return f"{base.__name__} is a class whose instances keep it"
    return None


def group_layers(model: nn.Module) -> list[tuple[str, ...]]:
    """Lets the LoRA layers that share an input be computed together; returns the names in each group.

    Calling it again after layers came or went finds the groups anew.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> group_layers(model)
        []
    """
    ungroup_layers(model)
    for parent in model.modules():
        layers = [child for child, module in parent.named_children() if _groupable(module)]
        groups = shared_inputs(parent, layers) if len(layers) > 1 else []
        if groups:
            parent.register_forward_pre_hook(_Open(groups, _let_compile(parent, groups)))
            parent.register_forward_hook(_close, always_call=True)
    return layer_groups(model)


def layer_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The names in each group of layers that are computed together.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> layer_groups(model)
        []
    """
    found = []
    for name, parent in model.named_modules():
        prefix = f"{name}." if name else ""
        for hook in parent._forward_pre_hooks.values():
            if isinstance(hook, _Open):
                found += [tuple(prefix + child for child in group) for group in hook.groups]
    return found


def ungroup_layers(model: nn.Module) -> None:
    """Undoes :func:`group_layers`.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> ungroup_layers(model)
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Open):
                del module._forward_pre_hooks[key]
        for key, hook in list(module._forward_hooks.items()):
            if hook is _close:
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        kind: Any = type(module)
        if _Grouped in kind.__bases__:
            module.__class__ = kind._lk_made_by[1]


def why_alone(model: nn.Module, groups: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    """(layer, reason) of each layer with LoRA siblings that is in no group."""
    inside = {name for group in groups for name in group}
    lines = []
    for name, parent in model.named_modules():
        prefix = f"{name}." if name else ""
        layers = [prefix + c for c, module in parent.named_children() if _groupable(module)]
        if len(layers) > 1 and not isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            kind = type(parent).__name__
            read = "shares its input with no other" if source(parent) else "has no source to read"
            reason = f"in the forward of {kind} it {read}"
            lines += [(layer, reason) for layer in layers if layer not in inside]
    return lines


def why_alone_compiled(model: nn.Module) -> list[tuple[str, str]]:
    """(layer, reason) of each layer in a group whose parent's forward ``torch.compile`` traces as it is."""
    lines = []
    for name, parent in model.named_modules():
        prefix = f"{name}." if name else ""
        for hook in parent._forward_pre_hooks.values():
            if isinstance(hook, _Open) and hook.why_not_compiled:
                lines += [(prefix + child, hook.why_not_compiled) for group in hook.groups for child in group]
    return lines
