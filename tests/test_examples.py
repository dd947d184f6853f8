"""Every example is short, says what it shows, and runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from lora_kernels import methods
from lora_kernels.init import INITIALISERS

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.name != "tiny.py")
LINES = 25
# Of methods of other models: CLIP, a diffusion's regions, a hypernetwork's tasks, plain matrices.
OWN_MODELS = {
    "clip_lora",
    "diffusion_unet",
    "dsire",
    "kohya",
    "lora_composer",
    "lora_composite",
    "psim",
    "saml",
}
# Programs that say more than how one method is called.
LONGER = {"diffusion_unet": 50, "many_adapters": 30, "new_method": 30, "serve_fastapi": 170}
# What an example needs besides PEFT and Transformers, by what its text says.
NEEDS = {"DerivativeFree": ("cma",), "from trl": ("trl",), "fastapi": ("fastapi", "uvicorn")}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, monkeypatch, capsys, tmp_path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGER.get(path.stem, LINES)
    assert ast.get_docstring(ast.parse(text))
    assert on_a_language_model(text) or path.stem in OWN_MODELS
    for package in itertools.chain.from_iterable(NEEDS[word] for word in NEEDS if word in text):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
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


def on_a_language_model(text):
    """Whether it runs on the tiny Llama, or on MiniLM."""
    return any(
        isinstance(node, ast.ImportFrom) and node.module == "tiny" and "llama" in {n.name for n in node.names}
        for node in ast.walk(ast.parse(text))
    ) or any("MiniLM" in word for word in words(text))


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


# What starts or trains an adapter is shown on a whole model.
ON_A_LANGUAGE_MODEL = ("start", "step")


def shown(method, examples):
    """Whether one of these examples uses the method, on a language model where its kind wants one."""
    texts = [path.read_text(encoding="utf-8") for path in examples]
    if method.kind in ON_A_LANGUAGE_MODEL:
        texts = [text for text in texts if on_a_language_model(text)]
    return bool(names_of(method) & set().union(*map(words, texts)))


@pytest.mark.parametrize(
    "method", [one for one in methods.REGISTER if one.kind in WITH_EXAMPLES], ids=lambda one: one.key
)
def test_every_method_has_an_example(method):
    assert shown(method, EXAMPLES)


@pytest.mark.parametrize("key", ["flasc", "autolora_robust"])
def test_a_method_without_an_example_is_found_out(key):
    method = next(one for one in methods.REGISTER if one.key == key)
    assert not shown(method, [path for path in EXAMPLES if path.stem != key])


def test_a_start_on_a_model_of_its_own_is_found_out(tmp_path):
    method = next(one for one in methods.REGISTER if one.key == "expressive_power")
    example = tmp_path / "expressive_power.py"
    example.write_text((FOLDER / "expressive_power.py").read_text(encoding="utf-8"), encoding="utf-8")
    assert shown(method, [example])
    example.write_text(example.read_text(encoding="utf-8").replace("from tiny import llama", ""))
    assert not shown(method, [example])
