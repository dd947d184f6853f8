"""Every example is short, says what it shows, and runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import runpy
from pathlib import Path

import pytest

pytest.importorskip("peft")

from lora_kernels import methods
from lora_kernels.init import INITIALISERS

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.name != "tiny.py")
LINES = 25


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, monkeypatch, capsys, tmp_path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    assert ast.get_docstring(ast.parse(text))
    if "DerivativeFree" in text:
        pytest.importorskip("cma")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_are_examples():
    assert EXAMPLES


def words(text):
    """The names and the strings of a program."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            found.update(alias.name for alias in node.names)
    return found


def names_of(method):
    """What an example of a method has one of: its start's name, or what its module defines for it."""
    module = importlib.import_module(f"lora_kernels.{method.home}")
    if method.kind == "start":
        drawn = {name for name, one in INITIALISERS.items() if one.draw.__module__ == module.__name__}
        return {name for name in drawn if not name.startswith("_")}
    own = {
        name: one
        for name, one in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(one) or inspect.isfunction(one))
        and one.__module__ == module.__name__
    }
    shared = any(other.home == method.home for other in methods.REGISTER if other is not method)
    keyed = {name for name, one in own.items() if getattr(one, "key", None) == method.key}
    return keyed or ({method.key} if shared else {*own})


WITH_EXAMPLES = ("start", "step", "company", "knowledge")


@pytest.mark.parametrize(
    "method", [one for one in methods.REGISTER if one.kind in WITH_EXAMPLES], ids=lambda one: one.key
)
def test_every_method_has_an_example(method):
    used = set().union(*(words(path.read_text(encoding="utf-8")) for path in EXAMPLES))
    assert names_of(method) & used


def test_a_method_without_an_example_is_found_out():
    method = next(one for one in methods.REGISTER if one.key == "flasc")
    others = [path for path in EXAMPLES if path.stem != "flasc"]
    assert not names_of(method) & set().union(*(words(path.read_text(encoding="utf-8")) for path in others))
