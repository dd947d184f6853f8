"""Plans for one LoRA linear: ``lora_linear`` and its rivals."""

from __future__ import annotations

import torch

from .checks import check
from .measure import BACKWARD, BOTH, FORWARD, OVERHEAD, OVERHEAD_FORWARD, PEAK_MEMORY, SAVED_BYTES
from .providers import FROZEN, PEFT, PROVIDERS, Case, make_problem
from .suites import DEFAULT, Benchmark, Goal, Plan

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

BENCHMARK = Benchmark(
    op="lora_linear",
    plans={DEFAULT: default_plans},
    modes=(FORWARD, BACKWARD, BOTH, OVERHEAD_FORWARD, OVERHEAD, SAVED_BYTES, PEAK_MEMORY),
    providers=PROVIDERS,
    baselines={FROZEN: "frozen", PEFT: "PEFT"},
    problem=make_problem,
    check=check,
    goals=GOALS,
)
