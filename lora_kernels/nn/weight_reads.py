"""Which layers' weights a module computes with, without calling the layer: found in its forward's source.

Mamba multiplies by ``self.dt_proj.weight``, ``nn.MultiheadAttention`` hands ``self.out_proj.weight`` to a
function, DeBERTa's encoder looks positions up in ``self.rel_embeddings.weight``. Followed are the methods
that the forward uses, functions that it gives itself or a child to, and variables that stand for a child.
The output layer of a language model counts as read.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from .wrappers import unwrapped

# From a module to one of those below it: names of children, or ANY for each of them.
Path = tuple[str, ...]
ANY = "*"
# A function, and which of its parameters stand for what.
_Function = tuple[Any, tuple[tuple[int | str, Path], ...]]
# What may be asked of a weight without computing with it.
_METADATA = {
    "dtype",
    "device",
    "shape",
    "ndim",
    "size",
    "dim",
    "numel",
    "requires_grad",
    "is_meta",
    "itemsize",
}
_ASKS = {"isinstance", "hasattr", "type", "id"}
# With gradients they call their linears, and without them a hook keeps them from reading: see `apply`.
_FAST_PATHS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


class Reads(NamedTuple):
    """Who computes with a layer's weight: (reader, the layer's name from there); and if it is called too."""

    by: list[tuple[nn.Module, str]]
    called: bool

    def instead(self) -> bool:
        """Whether a whole forward may come to pass without a call."""
        return not self.called or any(isinstance(reader, _FAST_PATHS) for reader, _ in self.by)

    def __str__(self) -> str:
        readers = dict.fromkeys(type(reader).__name__ for reader, _ in self.by)
        verb = "reads" if len(readers) == 1 else "read"
        also = "at times " if self.called else ""
        return f"{' and '.join(readers)} {also}{verb} its weight without calling it"


def weight_reads(model: nn.Module, fast_paths: bool = False) -> dict[int, Reads]:
    """The reads of each layer of ``model`` that has any, by the layer's id.

    Args:
        model: any module.
        fast_paths: whether those that torch's encoder layers do without gradients count as well.
    """
    by: dict[int, list[tuple[nn.Module, str]]] = {}
    called: set[int] = set()
    for module in model.modules():
        kind: Any = type(module)
        reads, calls = _paths(kind, _forward_of(module))
        for path in calls:
            called.update(id(layer) for _, layer in _resolve(module, path))
        if fast_paths or not isinstance(module, _FAST_PATHS):
            for path in reads:
                for name, layer in _resolve(module, path):
                    by.setdefault(id(layer), []).append((module, name))
        for name, layer in _head(module):
            called.add(id(layer))
            by.setdefault(id(layer), []).append((module, name))
    return {layer: Reads(readers, layer in called) for layer, readers in by.items()}


def _head(module: Any) -> Iterator[tuple[str, nn.Module]]:
    """The output layer of a language model.

    A loss in chunks (TRL, Liger) takes its weight from a forward that is put in place later.
    """
    found = None
    if callable(getattr(module, "get_output_embeddings", None)):
        with contextlib.suppress(AttributeError, NotImplementedError):
            found = module.get_output_embeddings()
    for name, layer in module.named_modules() if isinstance(found, nn.Module) else ():
        if layer is found and name:
            yield name, unwrapped(layer)


def _forward_of(module: nn.Module) -> Any:
    """The function that runs, also where somebody gave the instance its own."""
    own = vars(module).get("forward")
    return getattr(own, "__func__", None) or type(module).forward


def _resolve(module: nn.Module, path: Path) -> Iterator[tuple[str, nn.Module]]:
    (first, *rest) = path
    children = module._modules.items() if first == ANY else [(first, module._modules.get(first))]
    for name, outer in children:
        child = None if outer is None else unwrapped(outer)
        if child is not None and rest:
            yield from ((f"{name}.{below}", layer) for below, layer in _resolve(child, tuple(rest)))
        elif child is not None:
            yield name, child


@functools.cache
def _paths(kind: Any, forward: Any) -> tuple[set[Path], set[Path]]:
    """To the weights that ``forward``, of a module of ``kind``, computes with, and to what it calls."""
    reads: set[Path] = set()
    calls: set[Path] = set()
    waiting: list[_Function] = [(forward, ((0, ()),))]
    seen: set[_Function] = set()
    while waiting:
        function, given = waiting.pop()
        if (function, given) in seen:
            continue
        seen.add((function, given))
        tree = _tree(function)
        if tree is not None:
            visit = _Reads(kind, function, _bound(tree, given))
            visit.visit(tree)
            reads |= visit.reads
            calls |= visit.calls
            waiting += visit.functions
    return reads, calls


@functools.cache
def _tree(function: Any) -> ast.FunctionDef | None:
    with contextlib.suppress(OSError, TypeError, SyntaxError):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        return tree if isinstance(tree, ast.FunctionDef) else None
    return None


def _bound(tree: ast.FunctionDef, given: Iterable[tuple[int | str, Path]]) -> dict[str, Path]:
    """The parameters that stand for a module."""
    names = [parameter.arg for parameter in (*tree.args.posonlyargs, *tree.args.args)]
    return {(names[at] if at < len(names) else "") if isinstance(at, int) else at: path for at, path in given}


class _Reads(ast.NodeVisitor):
    """The reads and calls of one function, and the functions that it gives modules to."""

    def __init__(self, kind: type, function: Any, bound: dict[str, Path]) -> None:
        self.kind, self.function, self.bound = kind, function, bound
        self.reads: set[Path] = set()
        self.calls: set[Path] = set()
        self.functions: list[_Function] = []

    def path(self, node: ast.AST) -> Path | None:
        """From the module to what an expression names, if that may be a module."""
        match node:
            case ast.Name(name):
                return self.bound.get(name)
            case ast.Attribute(value, name):
                path = self.path(value)
                return None if path is None else (*path, name)
            case ast.Subscript(value):
                path = self.path(value)
                return None if path is None else (*path, ANY)
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self.path(node)
        if node.attr in _METADATA and isinstance(node.value, ast.Attribute) and node.value.attr == "weight":
            return
        if path and path[-1] == "weight" and len(path) > 1 and isinstance(node.ctx, ast.Load):
            self.reads.add(path[:-1])
        elif path and len(path) == 1 and self.bound.get(getattr(node.value, "id", "")) == ():
            self._follow(self._method(node.attr), ((0, ()),))  # a property, or a method called elsewhere
        elif isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super":
            for kind in self.kind.__mro__:
                self._follow(vars(kind).get(node.attr), ((0, ()),))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if getattr(node.func, "id", "") in _ASKS:
            return
        called = self.path(node.func)
        if called:
            self.calls.add(called)
        given: list[tuple[int | str, Path | None]] = [(at, self.path(v)) for at, v in enumerate(node.args)]
        given += [(word.arg, self.path(word.value)) for word in node.keywords if word.arg]
        modules = tuple((at, path) for at, path in given if path is not None)
        match node.func:
            case ast.Name(name) if modules:
                self._follow(inspect.unwrap(self.function).__globals__.get(name), modules)
            case ast.Attribute(value, name) if modules and self.path(value) == ():
                shifted = [(at + 1 if isinstance(at, int) else at, path) for at, path in modules]
                self._follow(self._method(name), ((0, ()), *shifted))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, self.path(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._bind_items(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind_items(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: Any) -> None:
        for one in node.generators:  # what they bind is used before them
            self.visit(one)
        self.generic_visit(node)

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def _bind_items(self, target: ast.AST, items: ast.AST) -> None:
        match target, items:
            case ast.Tuple([_, one]), ast.Call(ast.Name("enumerate"), [inner, *_]):
                self._bind_items(one, inner)
            case ast.Tuple(targets), ast.Call(ast.Name("zip"), inners):
                for one, inner in zip(targets, inners, strict=False):
                    self._bind_items(one, inner)
            case _:
                path = self.path(items)
                self._bind(target, None if path is None else (*path, ANY))

    def _bind(self, target: ast.AST, path: Path | None) -> None:
        if isinstance(target, ast.Name):
            self.bound.pop(target.id, None)
            if path is not None:
                self.bound[target.id] = path

    def _method(self, name: str) -> Any:
        found = inspect.getattr_static(self.kind, name, None)
        return found.fget if isinstance(found, property) else found

    def _follow(self, function: Any, given: Any) -> None:
        if isinstance(function, types.FunctionType) and function.__module__ != nn.Module.__module__:
            self.functions.append((function, given))
