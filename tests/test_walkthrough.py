"""docs/walkthrough.md, word for word: what ``make walkthrough`` runs, in an environment that was empty."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:^`(\S+)`:\n\n)?^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TAKEN = ("build", "constraints.txt", "examples")


def script(page):
    """The page's blocks as one program of bash, the named ones files that it writes."""
    parts = ["set -eu"]
    for name, language, text in BLOCK.findall(page):
        assert bool(name) == (language == "python"), (
            f"a block of python has a name, one of bash has none: {text}"
        )
        parts.append(f"cat > {name} <<'END_OF_{name}'\n{text}END_OF_{name}" if name else text)
    return "\n".join(parts)


@pytest.mark.exhaustive
@pytest.mark.skipif(not list(ROOT.glob("build/wheel/*.whl")), reason="make wheel makes what it installs")
def test_the_page_word_for_word(tmp_path):
    for name in TAKEN:
        (tmp_path / name).symlink_to(ROOT / name)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    program = script((ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8"))
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=tmp_path,
        env=clean | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert "14 LoRA layers fused, 0 left to PEFT" in done.stdout, done.stdout
    assert said["trained"] == said["served sums"] == "6." != said["served __base__"], done.stdout


def test_each_block_has_its_place():
    program = script((ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8"))
    assert "cat > train.py" in program and "pip install" in program and "/generate" in program
