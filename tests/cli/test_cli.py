import json

import pytest

from lora_kernels.cli import main


def test_env_says_why_each_backend_is_on_or_off(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"].startswith("on")
    assert all(state.startswith("on") or state.startswith("off: ") for state in facts["backends"].values())
    assert main(["env"]) == 0
    assert "auto picks" in capsys.readouterr().out


def test_unknown_command():
    with pytest.raises(SystemExit):
        main(["nonsense"])


def test_only_bench_passes_options_on(capsys):
    with pytest.raises(SystemExit):
        main(["env", "--nonsense"])
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
