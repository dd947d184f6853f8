"""PEFT's own tests on accelerated models: what passes on PEFT alone passes there too."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


def pytest_generate_tests(metafunc):
    given = metafunc.config.getoption("--peft-tests")
    files = sorted(pathlib.Path(given).resolve().rglob("test_*.py")) if given else []
    reason = "no tests of PEFT below --peft-tests" if given else "needs a checkout of PEFT: --peft-tests DIR"
    missing = pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")
    metafunc.parametrize("file", [pytest.param(file, id=file.stem) for file in files] or [missing])


def outcomes(file, folder, *options):
    """Test -> (outcome, last line of its error) of PEFT's own tests, in a process of their own."""
    found, path = (
        folder / "outcomes.jsonl",
        [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")],
    )
    found.unlink(missing_ok=True)
    plain = ["-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "accelerating", *plain, "--outcomes", str(found)]
    run = subprocess.run(
        [*command, f"--rootdir={file.parent}", *options],
        cwd=file.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
    )
    if not found.exists():
        pytest.skip(f"nothing ran: {' '.join(run.stdout.split())[-300:]}")
    rows = map(json.loads, found.read_text().splitlines())
    return {name: (outcome, *reason) for name, outcome, *reason in rows}


def test_what_passes_on_peft_passes_accelerated(file, tmp_path):
    accelerated = outcomes(file, tmp_path, file.name)
    failed = [name for name, (outcome, *_) in accelerated.items() if outcome == "failed"]
    (tmp_path / "failed").write_text("\n".join(failed))
    stock = outcomes(file, tmp_path, "--stock", f"@{tmp_path / 'failed'}") if failed else {}
    passed = sum(outcome == "passed" for outcome, *_ in accelerated.values())
    differences = [name for name in failed if stock.get(name, ("",))[0] == "passed"]
    print(f"{file.name}: {passed} pass accelerated, {len(failed)} do not, {len(differences)} of them on PEFT")
    assert not differences, "\n".join(f"{name}: {accelerated[name][-1]}" for name in differences)
