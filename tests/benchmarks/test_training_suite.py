from __future__ import annotations

import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import __main__ as command
from benchmarks import bench_beta_passes as passes
from benchmarks import bench_llama_layer as llama
from benchmarks import bench_lora_linear as linear
from benchmarks import report
from benchmarks.checks import check
from benchmarks.measure import Bench
from benchmarks.providers import LORAFUSION, PROVIDERS, Case, make_problem
from benchmarks.suites import TRAINING, Plan, Provider, Row, Runner
from lora_kernels import lora_linear
from lora_kernels.testing.timers import Summary

LINEAR = {provider.name: provider for provider in PROVIDERS}
LAYER = {provider.name: provider for provider in llama.PROVIDERS}
TINY = llama.LayerCase(2, 8, 32, 48, 4, 2, rank=4, dtype=torch.float32)
PASS_CASE = Case(40, 48, 24, rank=5)


def everyone(label):
    return True


def test_the_grid_covers_what_it_should():
    todo = command.selected(TRAINING, "cuda", False, everyone)
    cases = {plan.case for one, plan in todo if one is linear.BENCHMARK and plan.mode == "both"}
    shapes = {(4096, 4096), (5120, 5120), (8192, 8192), (4096, 1024), (4096, 14336), (14336, 4096)}
    want = itertools.product((512, 2048, 8192), shapes, (8, 16, 64, 128), (0.0, 0.1))
    assert {(c.rows, (c.cols, c.out), c.rank, c.dropout_p) for c in cases} == set(want)
    modes = {plan.mode for one, plan in todo if one is linear.BENCHMARK}
    assert modes == {"forward", "backward", "both", "peak_memory"}
    assert {one.op for one, _ in todo} >= {"lora_linear", "llama_layer", "beta_passes"}


def test_the_important_comes_first():
    todo = command.selected(TRAINING, "cuda", False, everyone)
    assert [plan.priority for _, plan in todo] == sorted(plan.priority for _, plan in todo)
    one, first = todo[0]
    assert one.label(first) == "lora_linear/8192x4096x4096/bfloat16/r16/p0.1/both"
    layers = [place for place, (one, _) in enumerate(todo) if one is llama.BENCHMARK]
    assert layers[0] < len(todo) / 10


def test_compiling_providers_are_few():
    todo = command.selected(TRAINING, "cuda", False, everyone)
    compiled = [
        1 for one, plan in todo for p in one.providers if "compiled" in p.name and one.runs(plan, p.name)
    ]
    assert 0 < len(compiled) <= 8


def fake_lorafusion(monkeypatch, scale=1.0):
    """Its signature and its limits, in our own terms."""

    def fused(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
        assert x.dim() == 3 and dropout_p > 0
        return lora_linear(x, linear_w, lora_a, lora_b, alpha * scale, linear_bias, dropout_p=dropout_p)

    module = types.ModuleType(LORAFUSION)
    module.fused_linear_lora = fused
    for name in ("lorafusion", "lorafusion.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, LORAFUSION, module)


def test_a_rival_without_a_path_for_no_dropout_is_checked_all_the_same(monkeypatch):
    fake_lorafusion(monkeypatch)
    assert check(LINEAR["lorafusion"], Case(16, 32, 24, rank=16, dropout_p=0.25)) is None
    fake_lorafusion(monkeypatch, scale=1.1)
    assert "y is off" in check(LINEAR["lorafusion"], Case(16, 32, 24, rank=16, dropout_p=0.25))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"device": "cpu"}, "need CUDA"),
        ({"dropout_p": 0.0}, "without dropout"),
        ({"rank": 8}, "rank that is a power of two"),
        ({"rank": 48}, "rank that is a power of two"),
        ({}, "lorafusion.ops.lora_v1 does not import"),
    ],
)
def test_a_rival_says_why_it_is_missing(options, why):
    case = replace(Case(16, 32, 24, rank=16, dropout_p=0.1, device="cuda"), **options)
    assert why in LINEAR["lorafusion"].missing(case, "both")


def test_a_rival_is_imported_from_the_path_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "some_rival.py").write_text("")
    assert command.main(["--rival-path", str(tmp_path), "--suite", "none"]) == 2
    assert str(tmp_path) in sys.path


@pytest.mark.parametrize(
    "case",
    [TINY, replace(TINY, dropout_p=0.25), replace(TINY, dtype=torch.bfloat16)],
    ids=lambda case: case.label,
)
@pytest.mark.parametrize("name", sorted(llama.UNCOMPILED))
def test_every_layer_that_is_here_is_right(name, case):
    provider = LAYER[name]
    if why := provider.missing(case, "both"):
        pytest.skip(why)
    assert llama.check(provider, case) is None


def test_a_wrong_layer_is_found_out():
    def build(problem):
        runner = LAYER["peft"].build(problem)
        return replace(runner, call=lambda x: runner.call(x) * 1.01)

    assert "y is off" in llama.check(Provider("suspect", build), TINY)


@pytest.mark.parametrize(
    ("p", "why"), [(0.0, "dropout does not act"), (None, "does not follow torch's seed")]
)
def test_a_layer_with_wrong_dropout_is_found_out(p, why):
    own = torch.Generator().manual_seed(0)

    def build(problem):
        runner = LAYER["peft"].build(replace(problem, case=replace(problem.case, dropout_p=0.0)))

        def call(x):
            if problem.case.dropout_p and p is None:
                x = x * (torch.rand(x.shape, generator=own) < 0.9)
            return runner.call(x)

        return replace(runner, call=call)

    assert why in llama.check(Provider("suspect", build), replace(TINY, dropout_p=0.25))


@pytest.mark.parametrize("name", [name for name in LINEAR if name.startswith("ours_triton")])
def test_every_strategy_is_right(name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("benchmarks.checks.PROBE", 16)
    case = Case(12, 32, 24, rank=4, dropout_p=0.25, device="cuda" if torch.cuda.is_available() else "cpu")
    assert check(LINEAR[name], case) is None


def test_layers_share_one_frozen_set_of_weights():
    problem = llama.make_problem(TINY)
    for name in ("frozen", "peft", "ours_apply_lora"):
        runner = LAYER[name].build(problem)
        assert runner.call(problem.x).requires_grad
    assert not any(p.requires_grad for p in problem.layer.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(problem.weight, llama.make_problem(TINY).weight, strict=True)
    )


def test_tokens_a_second():
    row = Row("peft", Plan(TINY, "both"), Summary(4.0, 4.0, 4.0))
    assert llama.tokens_per_second(row) == 16 / 4e-6
    assert llama.tokens_per_second(replace(row, plan=Plan(TINY, "forward"))) is None


@pytest.mark.parametrize("case", [PASS_CASE, replace(PASS_CASE, dropout_p=0.25)], ids=lambda case: case.label)
@pytest.mark.parametrize("provider", passes.BENCHMARK.providers, ids=lambda provider: provider.name)
def test_every_pass_is_right(provider, case):
    pytest.importorskip("triton")
    case = replace(case, device="cuda" if torch.cuda.is_available() else "cpu")
    assert passes.check(provider, case) is None


def test_a_wrong_pass_is_found_out():
    provider = Provider("x_pass", lambda problem: Runner(lambda x: (x * 0, problem.lora_a)))
    assert "result 0 is off" in passes.check(provider, PASS_CASE)


def test_floor_bytes_of_a_pass():
    m, k, n, r = 8192, 4096, 4096, 16
    case = Case(m, k, n, rank=r, dtype=torch.bfloat16, dropout_p=0.1)
    assert passes.floor_bytes("copy", case) == 4 * m * k
    assert passes.floor_bytes("x_pass", case) == 4 * m * k + m * k // 8 + 2 * (2 * r * k + m * r)
    row = Row("copy", Plan(case, "pass"), Summary(100.0, 90.0, 110.0), ratios={"copy": 1.0})
    assert passes.over_floor(row) == 1.0
    assert passes.moved_over_floor(row) is None  # not a kernel of ours
    assert passes.gigabytes_per_second(row) == pytest.approx(4 * m * k / 100e-6 / 1e9)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["branch_pass", "dy_pass", "x_pass"])
def test_what_a_launch_moves_is_near_the_floor(name, dropout_p):
    pytest.importorskip("lora_kernels.kernels.traffic")
    case = Case(8192, 4096, 4096, rank=16, dtype=torch.bfloat16, dropout_p=dropout_p)
    row = Row(name, Plan(case, "pass"), Summary(100.0, 90.0, 110.0))
    assert 0.99 <= passes.moved_over_floor(row) <= 1.3


def test_a_provider_that_fails_while_it_is_measured_leaves_the_others():
    calls = itertools.count()

    def build(problem):
        runner = LINEAR["eager"].build(problem)

        def call(x):
            if next(calls) > 0:
                raise RuntimeError("out of memory")
            return runner.call(x)

        return replace(runner, call=call)

    providers = (*(LINEAR[name] for name in linear.BENCHMARK.baselines), Provider("failing", build))
    bench = Bench(2)
    bench.run(replace(linear.BENCHMARK, providers=providers), Plan(Case(16, 32, 24, rank=4), "both"))
    assert {row.provider for _, row in bench.results.rows} == set(linear.BENCHMARK.baselines)
    assert ("failing", "RuntimeError: out of memory") in bench.results.wrong


def test_the_suite_runs_on_the_cpu(tmp_path):
    quick = ["--suite", "training", "--quick", "--device", "cpu", "--repeats", "1"]
    few = "p0/(both|pass)/(copy|gemm_into_y|ours_apply_lora|ours_reference)"
    assert command.main([*quick, "--filter", few, "--output", str(tmp_path)]) == 0
    text = (tmp_path / "cpu-training.md").read_text()
    for part in (
        "`lora_linear` 32x64x64",
        "`llama_layer` Llama layer, 2 sequences",
        "`beta_passes` 64x64x48",
    ):
        assert f"**{part}" in text
    assert "tokens/s" in text and "GB/s" in text
    assert (tmp_path / "cpu-training.csv").exists() and (tmp_path / "cpu-training.png").exists()


def test_a_run_that_is_cut_off_has_left_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "KEEP_SECONDS", 0.0)
    bench, kept = Bench(1), []
    few = frozenset({"eager"})
    todo = [(linear.BENCHMARK, Plan(Case(16, 32, 24, rank=4), m, few)) for m in ("forward", "both")]
    command.execute(bench, todo, keep=lambda: kept.append(len(bench.results.rows)))
    assert len(kept) == 2 and 0 < kept[0] < kept[1]
    assert report.csv_columns(bench.results)


def test_problems_are_of_the_device_and_dtype_asked_for():
    problem = make_problem(Case(4, 8, 6, rank=2, dtype=torch.float16))
    assert {t.dtype for t in (problem.x, problem.weight, problem.dy)} == {torch.float16}
