"""Texts with labels: the standard library's own docstrings, or the user's JSON lines."""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SKIPPED = {"test", "tests", "idlelib", "idle_test", "site-packages", "lib2to3", "turtledemo", "__pycache__"}
_SHORTEST = 25


@dataclass(frozen=True)
class Task:
    """A label set: texts, the class of each, and the names of the classes."""

    name: str
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]


@dataclass(frozen=True)
class _Docstring:
    text: str
    package: str
    kind: str
    returns: bool


def _docstrings() -> list[_Docstring]:
    """Every docstring of the standard library, read from its source; equal texts once."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, _Docstring] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED.isdisjoint(parts):
            package = parts[0].removesuffix(".py")
            for item in _of_file(path, package):
                found.setdefault(item.text, item)
    return list(found.values())


def _of_file(path: Path, package: str) -> Iterator[_Docstring]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    methods = {id(f) for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = " ".join((ast.get_docstring(node) or "").split())
        if len(text) >= _SHORTEST:
            yield _Docstring(text[:400], package, _kind(node, methods), _returns(node))


def _kind(node: ast.AST, methods: set[int]) -> str:
    if isinstance(node, ast.Module):
        return "module"
    if isinstance(node, ast.ClassDef):
        return "class"
    return "method" if id(node) in methods else "function"


def _returns(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Return) and part.value is not None for part in ast.walk(node))


def standard_library(train: int, test: int, seed: int = 0) -> list[Task]:
    """Three label sets over the docstrings: package, kind of object, whether a value is returned."""
    items = _docstrings()
    packages = {name for name, _ in Counter(item.package for item in items).most_common(8)}
    callables = [item for item in items if item.kind in ("function", "method")]
    label_sets = {
        "package": [(item.text, item.package) for item in items if item.package in packages],
        "kind of object": [(item.text, item.kind) for item in items],
        "returns a value": [(item.text, "yes" if item.returns else "no") for item in callables],
    }
    return [_task(name, pairs, train, test, seed) for name, pairs in label_sets.items()]


def _task(name: str, pairs: list[tuple[str, str]], train: int, test: int, seed: int) -> Task:
    """Balances the classes as far as they reach, shuffles and splits."""
    classes = sorted({label for _, label in pairs})
    rng = random.Random(seed)
    rng.shuffle(pairs)
    share = -(-(train + test) // len(classes))
    taken: Counter[str] = Counter()
    chosen = []
    for text, label in pairs:
        if taken[label] < share:
            taken[label] += 1
            chosen.append((text, classes.index(label)))
    rng.shuffle(chosen)
    held_out = min(test, len(chosen) // 3)
    return Task(name, chosen[held_out : held_out + train], chosen[:held_out], classes)


def from_jsonl(path: str, seed: int = 0) -> Task:
    """The user's own data: one ``{"text": ..., "label": ...}`` a line; a quarter is held out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not of that form, or there are fewer than 2 labels or 8 lines.
    """
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            pairs.append(_pair(line, f"{path}:{number}"))
    labels = {label for _, label in pairs}
    if len(labels) < 2 or len(pairs) < 8:
        raise ValueError(f"{path}: expected at least 8 lines of 2 labels, got {len(pairs)} of {len(labels)}")
    held_out = max(1, len(pairs) // 4)
    return _task(Path(path).stem, pairs, len(pairs), held_out, seed)


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        item = json.loads(line)
        return str(item["text"]), str(item["label"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: expected {{"text": ..., "label": ...}}, got {line[:60]!r}') from error
