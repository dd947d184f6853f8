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
from typing import Any

# Tests and copies of other projects; tables have texts that nobody wrote.
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "site-packages",
    "lib2to3",
    "turtledemo",
    "__pycache__",
} | {
    "encodings",
    "pydoc_data",
}
_SHORTEST, _LONGEST = 25, 400
_INNER = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Task:
    """A label set: texts, the class of each, and the names of the classes."""

    name: str
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]


@dataclass(frozen=True)
class Docstring:
    """A docstring in one line, whether its first paragraph ends with a full stop, whether it has more."""

    text: str
    stop: bool
    longer: bool


def docstrings() -> list[Docstring]:
    """The docstrings of the standard library, read from its source; equal texts once."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Docstring] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED.isdisjoint(parts):
            for item in _of_file(path):
                found.setdefault(item.text, item)
    return list(found.values())


def _of_file(path: Path) -> Iterator[Docstring]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    for node in _scopes(tree):
        text = ast.get_docstring(node) or ""
        line, (first, _, rest) = " ".join(text.split()), text.partition("\n\n")
        if len(line) >= _SHORTEST:
            yield Docstring(line[:_LONGEST], first.rstrip().endswith("."), bool(rest))


def _scopes(node: Any) -> Iterator[Any]:
    """``node`` and every class and function in it."""
    yield node
    for child in _statements(node):
        if isinstance(child, _INNER):
            yield from _scopes(child)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a scope, without those of scopes in it. Expressions, most of it, are left."""
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield child
            if not isinstance(child, _INNER):
                yield from _statements(child)


def standard_library(items: list[Docstring], train: int, test: int, seed: int = 0) -> list[Task]:
    """Three label sets over ``items``, of what PEP 257 asks of a docstring: mood, full stop and length.

    They ask for form and not for topic, which is what the features of a frozen encoder hold already. All
    take the texts in one order, so that many are in more than one set.
    """
    items = random.Random(seed).sample(items, len(items))
    texts = [item.text for item in items]
    label_sets = {
        "mood": _moods(texts),
        "full stop": ["yes" if item.stop else "no" for item in items],
        "length": ["more paragraphs" if item.longer else "one paragraph" for item in items],
    }
    return [
        _task(name, list(zip(texts, labels, strict=True)), train, test, seed)
        for name, labels in label_sets.items()
    ]


def _moods(texts: list[str]) -> list[str]:
    """Whether each text commands ("Return ..."), as PEP 257 wants, describes ("Returns ...") or does neither.

    A verb is a first word that is there in both forms.
    """
    first = [text.split()[0].lower() for text in texts]
    often = {word for word, count in Counter(first).items() if count > 1}
    verbs = {word for word in often if word + "s" in often}
    moods = {verb: "command" for verb in verbs} | {verb + "s": "description" for verb in verbs}
    return [moods.get(word, "neither") for word in first]


def _task(name: str, pairs: list[tuple[str, str]], train: int, test: int, seed: int) -> Task:
    """Balances the classes as far as they reach, shuffles and splits."""
    classes = sorted({label for _, label in pairs})
    share = -(-(train + test) // len(classes))
    taken: Counter[str] = Counter()
    chosen = []
    for text, label in pairs:
        if taken[label] < share:
            taken[label] += 1
            chosen.append((text, classes.index(label)))
    random.Random(seed).shuffle(chosen)
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
    random.Random(seed).shuffle(pairs)
    return _task(Path(path).stem, pairs, len(pairs), held_out, seed)


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        item = json.loads(line)
        return str(item["text"]), str(item["label"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: expected {{"text": ..., "label": ...}}, got {line[:60]!r}') from error
