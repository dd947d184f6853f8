"""Every ``python`` block of the README runs as it stands, each in a namespace of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_kernels import methods
from lora_kernels.cli.methods import with_table

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets():
    text = README.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        yield pytest.param(block, id=f"line-{text.count(chr(10), 0, block.start()) + 1}")


@pytest.mark.parametrize("block", list(snippets()))
def test_readme_snippet(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = block.string.count("\n", 0, block.start(1))
    code = compile("\n" * line + block.group(1), str(README), "exec")
    exec(code, {"__name__": "__main__"})


def test_the_readme_has_snippets():
    assert BLOCK.search(README.read_text(encoding="utf-8")), "README.md shows no python"


def test_what_is_made_of_the_register_is_up_to_date():
    text = (README.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text == methods.listing(), "run lora-kernels methods --write"
    readme = README.read_text(encoding="utf-8")
    assert with_table(readme) == readme, "run lora-kernels methods --write"
    assert methods.table() in readme
