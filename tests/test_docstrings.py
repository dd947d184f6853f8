"""Every public function has a short example in its docstring, and the examples run.

They see torch, nn, and all that the package and the function's own subpackage export, as docs/api.md says.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import lora_kernels
from lora_kernels import methods
from lora_kernels.adapters import METHODS

ROOT = Path(lora_kernels.__file__).parent
PACKAGES = [
    "lora_kernels",
    *sorted(f"lora_kernels.{path.parent.name}" for path in ROOT.glob("*/__init__.py")),
]
# A new line of output is as good as a blank, and addresses and the like may be left out.
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
LINES = 6


def public():
    """(package, object), each object once: functions, and the classes of the package itself."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isfunction(value) or (package == "lora_kernels" and inspect.isclass(value)):
                found.setdefault(value, package)
    return [pytest.param(package, value, id=value.__qualname__) for value, package in found.items()]


@pytest.fixture
def _forgets():
    """Takes back the method and the start that an example registers."""
    from lora_kernels.init import base

    starts = dict(base.INITIALISERS)
    yield
    for key in set(METHODS) - set(methods.structures()):
        del METHODS._classes[key]
    base.INITIALISERS.clear()
    base.INITIALISERS.update(starts)


@pytest.mark.usefixtures("_forgets")
@pytest.mark.parametrize("package, value", public())
def test_has_an_example_that_runs(package, value):
    names = {}
    exec(f"import torch\nfrom torch import nn\nfrom lora_kernels import *\nfrom {package} import *", names)
    text = inspect.getdoc(value) or ""
    test = doctest.DocTestParser().get_doctest(text, names, value.__qualname__, None, None)
    assert test.examples, "its docstring has no example"
    assert sum(one.source.count("\n") for one in test.examples) <= LINES
    out = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=out.append)
    assert not out, "".join(out)
