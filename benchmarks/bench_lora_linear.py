"""Plans for one LoRA linear: ``lora_linear`` and its rivals."""

from __future__ import annotations

import itertools

import torch

from .checks import check
from .measure import BACKWARD, BOTH, FORWARD, OVERHEAD, OVERHEAD_FORWARD, PEAK_MEMORY, SAVED_BYTES
from .providers import FROZEN, PEFT, PROVIDERS, Case, make_problem
from .suites import DEFAULT, TRAINING, Benchmark, Goal, Plan

TIMED = tuple(mode.name for mode in (FORWARD, BACKWARD, BOTH))
HOST = tuple(mode.name for mode in (OVERHEAD_FORWARD, OVERHEAD))
BYTES = tuple(mode.name for mode in (SAVED_BYTES, PEAK_MEMORY))


def cpu_plans(quick: bool) -> list[Plan]:
    rows, wide, narrow = (32, 128, 64) if quick else (512, 2048, 1024)
    timed = [Case(rows, wide, wide, dropout_p=p) for p in (0.0, 0.1)] + [Case(rows, narrow, narrow)]
    plans = [Plan(case, mode) for case in timed for mode in TIMED]
    plans += [Plan(Case(1, 64, 64), mode) for mode in HOST]
    saved = (128, 256, 256) if quick else (8192, 4096, 4096)
    half = [Case(*saved, dtype=torch.bfloat16, dropout_p=p) for p in (0.1, 0.0)]
    return plans + [Plan(case, SAVED_BYTES.name) for case in half]


def cuda_plans(quick: bool) -> list[Plan]:
    rows, width, ranks = ((256,), 512, (16,)) if quick else ((512, 2048, 8192), 4096, (16, 64))
    cases = [
        Case(m, width, width, rank=r, dtype=torch.bfloat16, dropout_p=p, device="cuda")
        for m in rows
        for r in ranks
        for p in (0.0, 0.1)
    ]
    plans = [Plan(case, mode) for case in cases for mode in (*TIMED, *BYTES)]
    return plans + [Plan(Case(1, 64, 64, dtype=torch.bfloat16, device="cuda"), mode) for mode in HOST]


def default_plans(device: str, quick: bool) -> list[Plan]:
    return cuda_plans(quick) if device == "cuda" else cpu_plans(quick)


LLAMA_3_8B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
SQUARES = ((5120, 5120), (8192, 8192))
# Compiling takes half a minute a case, and its figure moves little with the shape.
SLOW = frozenset({"peft_compiled"})
# Beside the baselines: who is measured at every point of the grid, and who at r=16.
FEW = frozenset({"recomputing_function", "lorafusion", "ours_module"})
MAIN = FEW | {p.name for p in PROVIDERS if p.name.startswith("ours_triton")}
ALL_BUT_SLOW = frozenset(p.name for p in PROVIDERS) - SLOW


def training_plans(device: str, quick: bool) -> list[Plan]:
    """The grid of training on a GPU: everything at the headline shape, ``both`` of the main ones elsewhere.

    By priority: 0 the headline, 2 the shapes at 8192 rows and r=16, 4 fewer rows, 5 other ranks, 6 the
    other modes. 1 and 3 are left to the other benchmarks of the suite.
    """
    if device != "cuda":
        return _quick_training_plans() if quick else []
    widths = ((512, 512), (512, 256)) if quick else (*LLAMA_3_8B, *SQUARES)
    rows, ranks = ((256, 64), (16, 8)) if quick else ((8192, 2048, 512), (16, 8, 64, 128))
    plans = []
    for m, (k, n), r, p in itertools.product(rows, widths, ranks, (0.1, 0.0)):
        case = Case(m, k, n, rank=r, dtype=torch.bfloat16, dropout_p=p, device="cuda")
        headline = (m, (k, n), r) == (rows[0], widths[0], 16)
        plans += _headline(case) if headline else _grid_point(case, rows[0])
    return plans


def _headline(case: Case) -> list[Plan]:
    modes = (*TIMED[::-1], PEAK_MEMORY.name)
    return [Plan(case, m, None if m == BOTH.name else ALL_BUT_SLOW) for m in modes]


def _grid_point(case: Case, most_rows: int) -> list[Plan]:
    usual = case.rank == 16
    first = (2 if case.rows == most_rows else 4) if usual else 5
    who = {2: ALL_BUT_SLOW, 4: MAIN, 5: FEW}[first]
    plans = [Plan(case, BOTH.name, who, usual, first)]
    if usual and case.dropout_p:
        others = (FORWARD.name, BACKWARD.name, PEAK_MEMORY.name)
        plans += [Plan(case, mode, MAIN, plotted=False, priority=6) for mode in others]
    return plans


def _quick_training_plans() -> list[Plan]:
    """On a CPU, to see it run: every provider and every mode that a CPU has."""
    cases = [Case(32, 64, 64, rank=r, dtype=torch.bfloat16, dropout_p=p) for r, p in ((16, 0.1), (8, 0.0))]
    return [Plan(case, mode, ALL_BUT_SLOW) for case in cases for mode in (*TIMED, SAVED_BYTES.name)]


# The bytes are compared with PEFT's on CUDA, where its dropout keeps one byte an element, not two.
GOALS = (
    Goal("fwd+bwd, fp32, / frozen", "512x2048x2048/float32/r16/p0", "both", FROZEN, 1.05, "ours_module"),
    Goal(
        "fwd+bwd, fp32, dropout 0.1, / frozen",
        *("512x2048x2048/float32/r16/p0.1", "both", FROZEN, 1.15, "ours_module"),
    ),
    Goal("per call, fwd+bwd, / PEFT", "1x64x64/float32/r16/p0", "overhead", PEFT, 0.65, "ours_module"),
    Goal(
        "bytes saved, bf16, dropout 0.1, / PEFT with a byte mask",
        *("8192x4096x4096/bfloat16/r16/p0.1", "saved_bytes", "peft_byte_mask", 0.72, "ours_module"),
    ),
)

HEADLINE = "8192x4096x4096/bfloat16/r16/p0.1"
GOALS += (
    Goal("fwd+bwd on the H100, beta, / frozen", HEADLINE, "both", FROZEN, 1.20, "ours_triton_beta"),
    Goal("fwd+bwd on the H100, best strategy, / frozen", HEADLINE, "both", FROZEN, 1.11, "ours_module"),
    Goal("fwd+bwd on the H100, / PEFT", HEADLINE, "both", PEFT, 1 / 1.4, "ours_module"),
)

BENCHMARK = Benchmark(
    op="lora_linear",
    plans={DEFAULT: default_plans, TRAINING: training_plans},
    modes=(FORWARD, BACKWARD, BOTH, OVERHEAD_FORWARD, OVERHEAD, SAVED_BYTES, PEAK_MEMORY),
    providers=PROVIDERS,
    baselines={FROZEN: "frozen", PEFT: "PEFT"},
    problem=make_problem,
    check=check,
    goals=GOALS,
)
