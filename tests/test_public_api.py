"""The surface: what is exported, how it is documented, and who may import whom."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
from pathlib import Path

import pytest

import lora_kernels
from lora_kernels import testing

PACKAGE = Path(lora_kernels.__file__).parent
# Lower layers first: a module imports from its own layer and from those before it.
LAYERS = (
    ("_version", "_settings", "_messages", "_arguments", "methods", "quant"),
    ("_extension", "_fakes", "_ops", "_cpu_ways", "planner"),
    ("_backend",),
    ("reference",),
    ("kernels",),
    ("ops",),
    ("adapters", "init", "routing"),
    ("nn", "optim", "serving", "stats", "testing", "compress", "analysis"),
    ("schedules", "compose"),
    ("integrations", "tuning", "tuning_cpu"),
    ("demo",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))


def module_id(path):
    return str(path.relative_to(PACKAGE))


def test_signature_of_lora_linear():
    given = str(inspect.signature(lora_kernels.lora_linear))
    names = re.sub(r": [^,=)]+?(?= =|,|\))| -> .*", "", given.replace("'", "")).replace(" = ", "=")
    assert names == (
        "(x, weight, lora_a, lora_b, scaling=1.0, bias=None, *, dropout_p=0.0, gate=None, x_lora=None,"
        " training=True)"
    )


@pytest.mark.parametrize("name", lora_kernels.__all__)
def test_everything_exported_exists_and_is_documented(name):
    value = getattr(lora_kernels, name)
    if callable(value):
        assert (inspect.getdoc(value) or "").strip(), f"{name} has no docstring"


def test_lora_linear_docstring_starts_with_the_equation_and_names_every_argument():
    text = inspect.getdoc(lora_kernels.lora_linear)
    assert text.startswith("y = x Wᵀ")
    for name in inspect.signature(lora_kernels.lora_linear).parameters:
        assert re.search(rf"^\s+{name}: ", text, re.MULTILINE), f"{name} is not described"
    assert "Raises:" in text and "Shapes:" in text and "Dtypes:" in text


def test_exports_are_sorted_and_unique():
    assert sorted(set(lora_kernels.__all__)) == sorted(lora_kernels.__all__)
    assert set(lora_kernels.__all__) <= set(dir(lora_kernels))


@pytest.mark.parametrize("name", testing.__all__)
def test_testing_exports(name):
    assert getattr(testing, name) is not None


def test_testing_has_nothing_else():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = testing.nothing


def layer_of(parts):
    return parts[0] if parts else None


def imported(path):
    """The packages of ours that a module imports, wherever in the file it does."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    package = parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if node.module:
                yield node.lineno, layer_of([*base, *node.module.split(".")])
            else:
                yield from ((node.lineno, layer_of([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_kernels":
            yield node.lineno, layer_of(node.module.split(".")[1:])


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parent != PACKAGE or p.stem in LEVEL], ids=module_id
)
def test_imports_point_downward(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for line, other in imported(path):
        if other in LEVEL:
            assert LEVEL[other] <= LEVEL[own], f"line {line}: {own} imports {other}"


def dotted(path):
    """Where the module is, as a tuple of names; a package's is that of its folder."""
    return path.relative_to(PACKAGE.parent).with_suffix("").parts


def imports(node):
    """Those of a module that run, early or late."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.level:
            yield child
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from imports(child)


def neighbours(path):
    for node in imports(ast.parse(path.read_text(encoding="utf-8"))):
        base = (*dotted(path)[: -node.level], *(node.module or "").split("."))
        for alias in node.names:
            below = PACKAGE.parent.joinpath(*base, alias.name)
            for found in (below.with_suffix(".py"), below / "__init__.py", below.parent.with_suffix(".py")):
                if found.exists() and found != path:
                    yield found
                    break
            else:
                yield below.parent / "__init__.py"


def test_no_module_imports_itself_by_way_of_others():
    graph = {path: {one for one in neighbours(path) if one != path} for path in MODULES}
    assert sum(map(len, graph.values())) > 2 * len(MODULES)
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) == len(MODULES)


def test_every_package_has_a_layer():
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert packages <= set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_only_settings_reads_the_environment(path):
    if path.stem == "_settings":
        assert "os.environ" in path.read_text(encoding="utf-8")
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), f"line {node.lineno} reads the environment"


TRACED = ("ops", "adapters", "routing", "nn")
READS_SOURCE = PACKAGE / "nn/weight_reads.py"  # of another model, once


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parts[len(PACKAGE.parts)] in TRACED and p != READS_SOURCE], ids=module_id
)
def test_what_is_traced_zips_equal_lengths(path):
    """torch.compile of torch 2.9 takes strict=False for strict."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            strict = [keyword.value for keyword in node.keywords if keyword.arg == "strict"]
            assert all(ast.literal_eval(value) for value in strict), f"line {node.lineno}"
