"""LoRA layers that a module's forward calls on one x: found by its source, computed together.

A group is found where the source of a parent's ``forward`` calls several LoRA children on the same
variable: ``self.q_proj(hidden_states)``, ``self.k_proj(hidden_states)``, ``self.v_proj(hidden_states)``.
While that forward runs, the first member called computes all of them in one call of
``lora_linear_group``, and the others hand out what is theirs if they are called on the very same tensor.
The model's source is left as it is, and a member that is called otherwise computes alone.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.lora_linear_group import fused_group
from ..quant import QuantizedWeight


class Member(NamedTuple):
    """The arguments of one layer's linear, as ``lora_linear`` takes them."""

    weight: Tensor | QuantizedWeight
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    gate: Tensor | None
    scaling: float
    dropout_p: float


def _groupable(layer: Any) -> bool:
    """A layer says what it computes for x in ``group_member(x)``: ``None`` if not one plain fused linear."""
    return callable(getattr(type(layer), "group_member", None))


class _Pending(NamedTuple):
    """Outputs that wait for their layers, and under what they were computed."""

    x: Tensor
    state: tuple[Any, ...]
    outputs: dict[int, Tensor]


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
        members = {id(one): (one, member) for one, member in _members(layers, x, layer.training)}
        if id(layer) not in members or len(members) < 2:
            return None
        parts = zip(*(member for _, member in members.values()), strict=True)
        outputs = dict(zip(members, fused_group(x, *map(list, parts)), strict=True))  # type: ignore[call-arg]
        self.pending[i] = _Pending(x, state, outputs)
        return outputs.pop(id(layer))


def _state(layer: Any, x: Tensor) -> tuple[Any, ...]:
    """What has to be the same for an output to be the one that a later call would compute."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), autocast, layer.training


def _members(layers: list[Any], x: Tensor, training: bool) -> Iterator[tuple[Any, Member]]:
    for layer in layers:
        member = layer.group_member(x) if _groupable(layer) else None
        if member is not None and layer.training == training and _fits(layer, member, x):
            yield layer, member


def _fits(layer: Any, member: Member, x: Tensor) -> bool:
    """Whether the layer's parameters are there to be used before the layer itself is called."""
    weight = member.weight
    plain = type(weight) in (Tensor, nn.Parameter, QuantizedWeight) and not layer._forward_pre_hooks
    return plain and weight.device == x.device and weight.shape[1] == x.shape[-1]


_local = threading.local()


def grouped(layer: Any, x: Tensor) -> Tensor | None:
    """The output of ``layer`` for ``x`` from its group, or ``None``: then the layer computes alone.

    ``torch.compile`` traces the layers one by one.
    """
    if torch.compiler.is_compiling():
        return None
    scopes = getattr(_local, "scopes", None)
    return scopes[-1].take(layer, x) if scopes else None


class _Open:
    """The forward pre-hook of a parent: its groups wait from here to the end of its forward."""

    def __init__(self, groups: list[tuple[str, ...]]) -> None:
        self.groups = groups

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


def group_layers(model: nn.Module) -> list[tuple[str, ...]]:
    """Lets the LoRA layers that share an input be computed together; returns the names in each group.

    Calling it again after layers came or went finds the groups anew.
    """
    ungroup_layers(model)
    for parent in model.modules():
        layers = [child for child, module in parent.named_children() if _groupable(module)]
        groups = shared_inputs(parent, layers) if len(layers) > 1 else []
        if groups:
            parent.register_forward_pre_hook(_Open(groups))
            parent.register_forward_hook(_close, always_call=True)
    return layer_groups(model)


def layer_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The names in each group of layers that are computed together."""
    found = []
    for name, parent in model.named_modules():
        prefix = f"{name}." if name else ""
        for hook in parent._forward_pre_hooks.values():
            if isinstance(hook, _Open):
                found += [tuple(prefix + child for child in group) for group in hook.groups]
    return found


def ungroup_layers(model: nn.Module) -> None:
    """Undoes :func:`group_layers`."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Open):
                del module._forward_pre_hooks[key]
        for key, hook in list(module._forward_hooks.items()):
            if hook is _close:
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def why_alone(model: nn.Module, groups: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    """(layer, reason) of each layer with LoRA siblings that is in no group."""
    inside = {name for group in groups for name in group}
    lines = []
    for name, parent in model.named_modules():
        prefix = f"{name}." if name else ""
        layers = [prefix + c for c, module in parent.named_children() if _groupable(module)]
        if len(layers) > 1 and not isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            kind = type(parent).__name__
            read = "shares its input with no other" if _source(parent) else "has no source to read"
            reason = f"in the forward of {kind} it {read}"
            lines += [(layer, reason) for layer in layers if layer not in inside]
    return lines


def shared_inputs(parent: nn.Module, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Which of the children ``names`` the forward of ``parent`` calls on one and the same variable."""
    tree = _source(parent)
    if tree is None:
        return []
    wanted, groups = set(names), {}  # type: ignore[var-annotated]
    names_in = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stores = [(node.lineno, node.id) for node in names_in if isinstance(node.ctx, ast.Store)]
    for call in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Call)), key=_position):
        child = _child_called(call)
        if child in wanted:
            variable = call.args[0].id  # type: ignore[attr-defined]
            # A variable that is bound anew between two calls is another one.
            epoch = sum(name == variable and line < call.lineno for line, name in stores)
            groups.setdefault((variable, epoch), []).append(child)
    unique = [tuple(dict.fromkeys(children)) for children in groups.values()]
    return [children for children in unique if len(children) > 1]


def _source(parent: nn.Module) -> ast.AST | None:
    with contextlib.suppress(OSError, TypeError, SyntaxError):
        return ast.parse(textwrap.dedent(inspect.getsource(type(parent).forward)))
    return None


def _position(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def _child_called(call: ast.Call) -> str | None:
    """The name of ``self.<name>(variable)``."""
    match call:
        case ast.Call(ast.Attribute(ast.Name("self"), name), [ast.Name()], []):
            return name
    return None
