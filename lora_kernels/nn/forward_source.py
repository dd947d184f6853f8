"""The source of a parent's forward: which children it calls on one x, and a twin that lets them share.

``torch.compile`` cannot keep what query, key and value share on an object that outlives the forward: inside
``torch.utils.checkpoint`` that is a side effect. So it lives in a local variable of a twin of the forward:
the same code but for a dict at its start and ``member(self, names, "q_proj", x, that_dict)`` in place of
``self.q_proj(x)``.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

# Functions that see the variables of who calls them.
_LOOKS = {"locals", "vars", "dir", "eval", "exec"}
_APART = "it is not always called together with the others"
_MEMBER, _HELD = "_lk_member", "_lk_held"
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (*_DEFINITIONS, *_COMPREHENSIONS, ast.Lambda)
_REPEATS = (ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar)
# What may be asked of a tensor between two calls: none of these gives its memory away.
_METADATA = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "requires_grad"}

Calls = list[tuple[str, ast.Call]]


class CannotRewrite(Exception):
    """A forward has no faithful twin; the message says why."""


def source(parent: nn.Module) -> ast.AST | None:
    """The tree of the forward of the parent's class, or ``None`` where there is no source."""
    with contextlib.suppress(OSError, TypeError, SyntaxError):
        return ast.parse(textwrap.dedent(inspect.getsource(type(parent).forward)))
    return None


def shared_inputs(parent: nn.Module, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Which of the children ``names`` the forward of ``parent`` calls on one and the same variable."""
    tree = source(parent)
    return [] if tree is None else [_names(calls) for calls in _shared_calls(tree, names)]


def _names(calls: Calls) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name, _ in calls))


def _shared_calls(tree: ast.AST, names: Iterable[str]) -> list[Calls]:
    """The calls ``self.<name>(variable)`` on one value of a variable, of two children or more, in order."""
    wanted, groups = set(names), {}  # type: ignore[var-annotated]
    names_in = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stores = [(node.lineno, node.id) for node in names_in if isinstance(node.ctx, ast.Store)]
    for call in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Call)), key=_end):
        child = _child_called(call)
        if child in wanted:
            variable = _variable(call)
            # A variable that is bound anew between two calls is another one.
            epoch = sum(name == variable and line < call.lineno for line, name in stores)
            groups.setdefault((variable, epoch), []).append((child, call))
    return [calls for calls in groups.values() if len(_names(calls)) > 1]


def _start(node: Any) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: Any) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def _child_called(call: ast.AST) -> str | None:
    """The name of ``self.<name>(variable)``."""
    match call:
        case ast.Call(ast.Attribute(ast.Name("self"), name), [ast.Name()], []):
            return name
    return None


def _variable(call: ast.Call) -> str:
    return call.args[0].id  # type: ignore[attr-defined]


def twin(
    forward: Any, groups: Sequence[tuple[str, ...]], linears: Iterable[str], member: Callable[..., Any]
) -> Callable[..., Any]:
    """``forward`` with the calls of the groups' children replaced by calls of ``member``.

    Args:
        forward: the function of a class.
        groups: names of children, as :func:`shared_inputs` gives them.
        linears: the children that are known not to write into what they are called on.
        member: called with the parent, the names of the group, one of them, x, and a dict that is new in
            every run of the forward.

    Raises:
        CannotRewrite: the twin would not be the same function.
    """
    if not isinstance(forward, types.FunctionType):
        raise CannotRewrite("its forward is no function")
    if hasattr(forward, "__wrapped__"):
        raise CannotRewrite("its forward is decorated")
    if forward.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise CannotRewrite("its forward is a generator")
    tree, definition = _parse(forward)
    if not any(code == forward.__code__ for code in _codes(_compiled(tree, forward))):
        raise CannotRewrite("the source of its forward is not what runs")
    if any(isinstance(node, ast.Name) and node.id in _LOOKS for node in ast.walk(definition)):
        raise CannotRewrite("its forward may look at its own local variables")
    _rewrite(definition, groups, set(linears))
    # In a function that has a variable for `member`, so that it need not be a global of that module.
    _Replace({definition: _in_function(definition)}).visit(tree)
    wanted = (code for code in _codes(_compiled(tree, forward)) if _MEMBER in code.co_freevars)
    return _function(forward, next(wanted), {_MEMBER: types.CellType(member)})


def _function(forward: types.FunctionType, code: types.CodeType, cells: dict[str, Any]) -> Callable[..., Any]:
    """A function as ``forward`` is, with another code and further cells."""
    own = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)) | cells
    closure = tuple(own[name] for name in code.co_freevars)
    made = types.FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, closure)
    made.__kwdefaults__ = forward.__kwdefaults__
    made.__module__, made.__qualname__ = forward.__module__, forward.__qualname__
    return made


def _parse(forward: types.FunctionType) -> tuple[ast.Module, Any]:
    """The file of ``forward`` without the classes and functions that are beside it, and its definition."""
    try:
        lines, first = inspect.findsource(forward)
        tree = ast.parse("".join(lines))
    except (OSError, TypeError, SyntaxError):
        raise CannotRewrite("its forward has no source to read") from None
    line, name = first + 1, forward.__code__.co_name
    tree.body = [node for node in tree.body if not isinstance(node, _DEFINITIONS) or _holds(node, line)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node.lineno, node.name) == (line, name):
            return tree, node
    raise CannotRewrite("its forward is not defined by a def of its own")


def _holds(node: Any, line: int) -> bool:
    first = min(one.lineno for one in (node, *node.decorator_list))
    return first <= line <= node.end_lineno


def _compiled(tree: ast.Module, forward: types.FunctionType) -> types.CodeType:
    return compile(tree, forward.__code__.co_filename, "exec", dont_inherit=True)


def _in_function(definition: ast.FunctionDef) -> ast.FunctionDef:
    """A function that has a local variable for ``member`` and ``definition`` inside."""
    (outer,) = ast.parse(f"def _():\n  {_MEMBER} = None\n").body
    for node in ast.walk(outer):
        ast.copy_location(node, definition)
    outer.body.append(definition)  # type: ignore[attr-defined]
    return outer  # type: ignore[return-value]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """All code inside, the outer before the inner."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield inner
            yield from _codes(inner)


def _rewrite(definition: ast.FunctionDef, groups: Sequence[tuple[str, ...]], linears: set[str]) -> None:
    """Replaces the calls of the groups in ``definition`` and gives it the dict."""
    names = {name for group in groups for name in group}
    found, reasons = {}, []
    for calls in _shared_calls(definition, names):
        reason = _hazard(definition, calls, linears)
        reasons += [reason] if reason else []
        found.update({} if reason else {call: _names(calls) for _, call in calls})
    if not found:
        raise CannotRewrite(next(iter(reasons), "it shares its input with no other"))
    _Replace({call: _through_member(call, group) for call, group in found.items()}).visit(definition)
    at = int(ast.get_docstring(definition, clean=False) is not None)
    (held,) = ast.parse(f"{_HELD} = {{}}").body
    for node in ast.walk(held):
        ast.copy_location(node, definition.body[0])
    definition.body.insert(at, held)


class _Replace(ast.NodeTransformer):
    """Puts other nodes in place of those given."""

    def __init__(self, others: dict[Any, ast.AST]) -> None:
        self.others = others

    def visit(self, node: ast.AST) -> Any:
        return self.others[node] if node in self.others else self.generic_visit(node)


def _through_member(call: ast.Call, names: tuple[str, ...]) -> ast.expr:
    """``self.q_proj(x)`` as ``_lk_member(self, names, "q_proj", x, _lk_held)``."""
    variable = _variable(call)
    made = ast.parse(f"{_MEMBER}(self, {names!r}, {_child_called(call)!r}, {variable}, {_HELD})", mode="eval")
    for node in ast.walk(made.body):
        ast.copy_location(node, call)
    return made.body


def _hazard(definition: ast.FunctionDef, calls: Calls, linears: set[str]) -> str | None:
    """Why what one call computes might not be what a later one would: no trace shows a tensor's version."""
    outer = _parents(definition)
    for _, call in calls:
        around = list(_ancestors(call, outer))
        if any(isinstance(node, _SCOPES) for node in around[:-1]):
            return "it is called in a function inside the forward"
        if any(isinstance(node, _REPEATS) for node in around):
            return "it is called in a loop or a try"
    if len({_branch(call, outer) for _, call in calls}) > 1:
        return _APART  # an output that nobody uses would be a gradient of zeros
    first = next(node for node in _ancestors(calls[0][1], outer) if isinstance(node, ast.stmt))
    start, end = _start(first), max(_end(call) for _, call in calls)
    between = [n for n in ast.walk(definition) if hasattr(n, "lineno") and start <= _start(n) <= end]
    if any(isinstance(n, ast.Return) and _end(n) < end for n in between):
        return _APART
    if any(_writes(node) for node in between):
        return "something is written in place between the calls"
    variable = _variable(calls[0][1])
    uses = [node for node in between if isinstance(node, ast.Name) and node.id == variable]
    if not all(_harmless(node, outer, linears) for node in uses):
        return f"{variable} is used otherwise between the calls"
    return None


def _parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _ancestors(node: ast.AST, outer: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while node in outer:
        node = outer[node]
        yield node


def _branch(node: ast.AST, outer: dict[ast.AST, ast.AST]) -> tuple[Any, ...]:
    """Each place around a node that may be reached or not, or under other settings."""
    places: list[Any] = []
    for around in _ancestors(node, outer):
        if isinstance(around, (ast.If, ast.IfExp, ast.BoolOp, ast.Match, ast.With)):
            field = next(f for f, value in ast.iter_fields(around) if node is value or node in _listed(value))
            places += [around, node if isinstance(around, (ast.BoolOp, ast.Match)) else field]
        node = around
    return tuple(places)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _writes(node: ast.AST) -> bool:
    match node:
        case ast.AugAssign() | ast.Subscript(ctx=ast.Store()) | ast.keyword("out"):
            return True
        case ast.Call(ast.Attribute(_, name)) | ast.Call(ast.Name(name)):
            return name.endswith("_") and not name.endswith("__")
        case ast.keyword("inplace"):
            return True
    return False


def _harmless(use: ast.Name, outer: dict[ast.AST, ast.AST], linears: set[str]) -> bool:
    """Whether the variable is read as a linear's input, for its sizes, or as ``None`` or not."""
    if isinstance(use.ctx, ast.Store):
        # Another value from here on, which is not the same object.
        return True
    match outer[use]:
        case ast.Call() as call:
            return _child_called(call) in linears
        case ast.Attribute(_, name, ast.Load()):
            return name in _METADATA
        case ast.Compare(_, [ast.Is() | ast.IsNot()], [ast.Constant(None)]):
            return True
    return False
