"""``lora-kernels tune`` with injected times: all of it but the clock."""

import json

import pytest
import torch

pytest.importorskip("triton")

import argparse

from lora_kernels import _cpu_ways, _extension, planner, tuning, tuning_cpu
from lora_kernels.cli import main, tune
from lora_kernels.planner import Plan, Problem

SHAPES = ("--shape", "24x40x32", "--rank", "4", "--dtype", "fp32", "--dropout", "0.1")


class Scripted:
    """A timer that runs the work once and gives it the time of the script: by strategy, else 50."""

    def __init__(self, times, broken=()):
        self.times, self.broken, self.samples = times, broken, 0

    def sampler(self, prepare, run):
        if run.plan.strategy in self.broken:
            raise RuntimeError("out of resource: shared memory\nmore lines")
        run(prepare())

        def sample():
            self.samples += 1
            return self.times.get(run.plan.strategy, 50.0) + (0.25 if run.plan.tile else 0.0)

        return sample


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLANS", str(tmp_path))
    planner.refresh()
    yield tmp_path
    monkeypatch.undo()
    planner.refresh()
    if _extension.load() is None:
        _cpu_ways.settle()


@pytest.fixture
def few(monkeypatch):
    """Fewer plans: the interpreter takes its time over each."""
    changed = Plan("kext", {"gemm": {"block_k": 16}})
    monkeypatch.setattr(tuning, "FORWARD", (Plan("beta"), Plan("kext"), changed))
    monkeypatch.setattr(tuning, "FEW_ROWS", (Plan("single"),))
    monkeypatch.setattr(tuning, "BACKWARD", (Plan("beta"), Plan("kext")))


def arguments(*options):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args([*options, "--repeats", "3"])


def tuned(timer, device, *options):
    return tune.tune(arguments(*SHAPES, *options), device, planner.card(device), timer)


def problem(device, op="lora_linear", rows=24):
    return Problem(op, rows, 40, 32, 4, "fp32", planner.card(device), dropout=True)


@pytest.mark.parametrize("winner", ("beta", "kext", "single"))
def test_the_fastest_runs_from_then_on(winner, device, folder, few, capsys):
    timer = Scripted({winner: 10.0})
    assert tuned(timer, device) == 0
    assert timer.samples == 3 * (4 + 2)
    assert planner.plan(problem(device)) == Plan(winner)  # in this process, at once
    backward = planner.plan(problem(device, "lora_linear_backward"))
    assert backward == Plan("beta" if winner == "single" else winner)
    out = capsys.readouterr().out
    assert f"{winner}, 10.0 us" in out
    assert winner == "beta" or "5.00 x as fast as beta" in out
    assert str(folder / f"{planner.card(device)}.json") in out


def test_a_second_run_adds_to_the_table(device, folder, few):
    assert tuned(Scripted({"kext": 10.0}), device) == 0
    assert tuned(Scripted({"beta": 5.0}), device, "--shape", "200x40x32") == 0
    data = json.loads((folder / f"{planner.card(device)}.json").read_text())
    assert data["kind"] == "measured"
    assert len(data["entries"]) == 4
    assert planner.plan(problem(device)) == Plan("beta")  # measured anew
    assert [path.name for path in folder.iterdir()] == [f"{planner.card(device)}.json"]


def test_what_cannot_run_is_left_out_with_its_reason(device, few, capsys):
    assert tuned(Scripted({"kext": 1.0}, broken=("kext",)), device) == 0
    out = capsys.readouterr().out
    assert "kext left out: RuntimeError: out of resource: shared memory" in out
    assert "more lines" not in out
    assert planner.plan(problem(device)).strategy != "kext"


def test_a_wrong_result_is_never_timed(device, few, monkeypatch):
    from lora_kernels.kernels import kext

    right = kext.forward

    def wrong(*args):
        y, *rest = right(*args)
        return y + 0.01, *rest

    monkeypatch.setattr(kext, "forward", wrong)
    result = tuning.measure(problem(device), device, Scripted({"kext": 1.0}), 2)
    assert {plan.strategy for plan, _ in result.entry.times} == {"beta", "single"}
    assert all("AssertionError: result 0" in reason for _, reason in result.failed)
    assert len(result.failed) == 2


def test_nothing_measured_is_a_failure(device, few, capsys):
    assert tuned(Scripted({}, broken=("beta", "kext", "single")), device) == 1
    assert "nothing could be measured" in capsys.readouterr().out


def test_a_foreign_table_is_replaced(device, folder, few):
    (folder / f"{planner.card(device)}.json").write_text("not a table")
    assert tuned(Scripted({"kext": 10.0}), device) == 0
    assert planner.plan(problem(device)) == Plan("kext")


def test_a_write_that_fails_changes_nothing(device, folder, monkeypatch):
    path = folder / "table.json"
    tuning.write(path, "before")
    monkeypatch.setattr(tuning.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuning.write(path, "after")
    assert path.read_text() == "before" and [p.name for p in folder.iterdir()] == ["table.json"]


def test_every_plan_to_try_is_one_that_a_table_can_hold():
    for tried in (*tuning.FORWARD, *tuning.FEW_ROWS, *tuning.BACKWARD):
        assert planner._parse_plan({"strategy": tried.strategy, "tile": tried.tile}) == tried


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys):
    assert main(["tune"]) == 2
    said = capsys.readouterr().out
    assert "there is no CUDA device here" in said and "--cpu" in said


class ByWay:
    """Says what each way takes, by the one in force as its sampler is made."""

    def __init__(self, times):
        self.times = times

    def sampler(self, prepare, run):
        run(prepare())
        way = _cpu_ways._forced
        return lambda: self.times[way]


built = pytest.mark.skipif(_extension.load() is not None, reason="the extension is not built")


@built
@pytest.mark.parametrize("best", _cpu_ways.WAYS)
def test_the_fastest_way_is_remembered(best, folder, capsys):
    assert _cpu_ways.remembered() == {}
    timer = ByWay({way: 8.0 if way == best else 10.0 for way in _cpu_ways.WAYS})
    assert tune.tune_cpu(arguments("--cpu", "--shape", "9x40x33", "--rank", "3"), timer) == 0
    assert f"{best}, 8 us (" in capsys.readouterr().out
    name = _cpu_ways.shape_class(9, 40 * 33, 3)
    assert _cpu_ways.now()["lora_linear"][name] == (best, "measured here")
    assert _cpu_ways._native().way(0, 9, 40 * 33, 3) == _cpu_ways.WAYS.index(best)
    untouched = _cpu_ways.shape_class(9, 2**22, 3)
    assert _cpu_ways.now()["lora_linear"][untouched].why.startswith("default for")
    assert json.loads((folder / "cpu.json").read_text())["processor"] == _cpu_ways.processor()


@built
def test_a_second_run_on_the_cpu_adds_to_the_table(folder):
    for shape in ("9x40x33", "600x40x33"):
        arguments_now = arguments("--cpu", "--shape", shape, "--rank", "3")
        assert tune.tune_cpu(arguments_now, ByWay(dict.fromkeys(_cpu_ways.WAYS, 1.0))) == 0
    assert len(_cpu_ways.remembered()["lora_linear"]) == 2


@built
def test_without_a_shape_every_class_is_measured(folder, monkeypatch):
    seen = []

    def measure(op, shape, timer, repeats):
        seen.append((op, shape))
        return {}

    monkeypatch.setattr(tuning_cpu, "measure", measure)
    assert tune.tune_cpu(arguments("--cpu"), None) == 0
    assert len(set(seen)) == len(tuning_cpu.ops()) * len(_cpu_ways.CLASSES)


@built
def test_a_table_elsewhere_is_written_and_not_used(folder, capsys):
    other = folder / "elsewhere" / "cpu.json"
    args = arguments("--cpu", "--shape", "9x40x33", "--output", str(other))
    assert tune.tune_cpu(args, ByWay(dict.fromkeys(_cpu_ways.WAYS, 1.0))) == 0
    assert other.exists() and _cpu_ways.remembered() == {}
    assert "from now on" not in capsys.readouterr().out


def test_a_table_of_another_processor_is_not_ours(folder):
    name = _cpu_ways.CLASSES[0]
    text = _cpu_ways.to_text({"lora_linear": {name: {"vendor": 1.0}}})
    (folder / "cpu.json").write_text(text)
    assert _cpu_ways.remembered()
    (folder / "cpu.json").write_text(text.replace(_cpu_ways.processor(), "another"))
    assert _cpu_ways.remembered() == {}


@pytest.mark.parametrize(
    "times",
    (
        {"lora_linear": {"few": {"vendor": 1}}},
        {"no_op": {"few/small/low": {"vendor": 1}}},
        {"lora_linear": {"few/small/low": {"mkl": 1}}},
        {"lora_linear": {"few/small/low": {"vendor": -1}}},
        {"lora_linear": {"few/small/low": {}}},
        {"lora_linear": 3},
        None,
    ),
    ids=str,
)
def test_unsound_times_of_the_processor_are_left_out(times, folder):
    data = {"format": _cpu_ways.FORMAT, "processor": _cpu_ways.processor(), "times": times}
    (folder / "cpu.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning, match=r"cpu.json is left out, tune again"):
        assert _cpu_ways.remembered() == {}


@pytest.mark.parametrize("text", ("no JSON", "{}", "[]", '{"format": "lora-kernels cpu 1"}'))
def test_an_unsound_table_of_the_processor_is_left_out(text, folder):
    (folder / "cpu.json").write_text(text)
    with pytest.warns(UserWarning, match=r"cpu.json is left out, tune again"):
        assert _cpu_ways.remembered() == {}


@pytest.mark.parametrize("shape", ("8x8", "8x8x8x8", "axbxc", "0x8x8", "-1x8x8"))
def test_bad_shape(shape, device, capsys):
    assert tune.tune(arguments(f"--shape={shape}"), device, "cpu", None) == 2
    assert "--shape: expected MxKxN" in capsys.readouterr().err


def test_a_models_projections(tmp_path):
    config = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = tune.model_shapes(str(tmp_path / "config.json"), [512])
    assert shapes == [(512, 4096, 4096), (512, 4096, 1024), (512, 4096, 14336), (512, 14336, 4096)]
    with pytest.raises(ValueError, match=r"--model: .* is not a model's config\.json"):
        tune.model_shapes(str(tmp_path / "none.json"), [512])


def test_inspect_prints_bytes(capsys):
    assert main(["inspect", "--bytes", "--json", "--shape", "512x1024x2048", "--rank", "8"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["name"] for row in rows} >= {
        "branch_pass",
        "dy_pass",
        "kext",
        "chain y",
    }
    assert all(row["memory"] >= row["floor"] > 0 for row in rows)


def test_predicting_wants_a_file_of_its_own(tmp_path, capsys):
    assert main(["tune", "--predict", "sm_90"]) == 2
    path = tmp_path / "sm_90.json"
    assert main(["tune", "--predict", "sm_90", "--shape", "8x64x64", "--output", str(path)]) == 0
    assert planner.read(path, "sm_90").kind == "predicted"
