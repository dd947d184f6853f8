"""Every kernel compiled for each target with no card: no spill, tensor cores, wide loads."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MMA = {
    "sm_80": {"HMMA"},
    "sm_90": {"HGMMA", "HMMA"},
    "sm_100": {"UTCHMMA", "HMMA"},
    "gfx942": {"MFMA"},
}
GEMM_MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
GATHER = {"gather_shrink", "gather_expand", "page_grad", "stacked_shrink", "stacked_expand"}
GROUP = {"group_forward", "group_x_pass"}
KEEP_BITS = {"split", "add_kept"}
NO_MATMUL = {"sum_parts", "dropout_mask", "scale", "split", "add_kept", "batch_plan", "glu", "glu_backward"}
SMALL = {"stacked_sum"}
# Triton 3.6's ptxas stores one value and reads it in one place, at 56 registers of 255.
ASIDE = {"stacked_expand": 8} if triton.__version__.startswith("3.6.") else {}
CHAIN = {"gate_chain", "gate_grads"}
# Codes come as bytes and are looked up one by one.
CODES = {"quantized", "dequantize"}


# Memory-bound: while one thread block waits for its tiles another one has to have work.
PASSES = {"forward", "dy_pass", "x_pass"}
REGISTERS, WARP_REGISTERS = 64 * 1024, 256  # of a multiprocessor, and the unit they are given out in


def _blocks_at_once(row: dict) -> int:
    """Thread blocks that one multiprocessor has registers and shared memory for."""
    a_warp = -(-row["registers"] * 32 // WARP_REGISTERS) * WARP_REGISTERS
    return min(REGISTERS // (a_warp * row["warps"]), SHARED_LIMIT[row["target"]] // row["shared"])


def _inspect(*options: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lora_kernels.cli", "inspect", "--json", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check(row: dict) -> None:
    name = f"{row['kernel']}/{row['variant']} {row['dtype']} rank {row['rank']} {row['target']}"
    assert row["spills"] <= ASIDE.get(row["kernel"], 0), f"{name} spills {row['spills']} bytes"
    assert row["shared"] <= SHARED_LIMIT[row["target"]], f"{name}: {row['shared']} bytes of shared memory"
    if row["kernel"] in SMALL:  # a few numbers a row
        return
    if row["kernel"] not in NO_MATMUL | {"dequantize"}:
        assert row["mma"] in MMA[row["target"]], f"{name}: no tensor-core instruction ({row['mma']})"
    if row["target"] == "gfx942":  # which loads are wide there has not been tuned
        return
    if row["kernel"] == "kext":  # the large operands come in by the copy engine where there is one
        assert row["mma"] == GEMM_MMA[row["target"]], f"{name}: {row['mma']}"
        assert (row["copies"] >= 2) == (row["target"] in ("sm_90", "sm_100")), (
            f"{name}: {row['copies']} copies"
        )
        assert row["wide_loads"] >= 2, f"{name}: no wide load"
    elif (
        row["kernel"] in GATHER | KEEP_BITS | GROUP
    ):  # indices, h and bits are read singly; what is large is not
        assert row["wide_loads"] > 0, f"{name}: no wide load"
    elif row["dtype"] == "bf16" and row["kernel"] not in CODES | {
        "batch_plan"
    }:  # a plan reads a few hundred ids
        assert row["wide_loads"] > row["narrow_loads"], f"{name}: {row['narrow_loads']} narrow loads"


def _kernels(rank: int) -> set[str]:
    """Those that are compiled for a rank, and those that know none."""
    narrow = {*GATHER, *GROUP, *SMALL, "kext"} if rank <= 64 else set()
    narrow |= {"single"} if rank <= 128 else set()
    codes = {16: CODES, 64: {"quantized"}}.get(rank, set())
    usual = {"forward", "dy_pass", "x_pass", "low_rank_norm", "invariant_linear"}
    return {*usual, *narrow, *codes, *NO_MATMUL, *CHAIN}


def _check_all(rows: list[dict]) -> None:
    # Sixteen rows, of one adapter, of a weight or in all, are fewer than a warpgroup's matmul takes.
    few = GATHER | CODES | GROUP | {"low_rank_norm", "single", "invariant_linear"}
    few |= NO_MATMUL | SMALL
    for row in rows:
        _check(row)
        half = row["dtype"] == "bf16"
        if half and row["target"] == "sm_90" and row["rank"] in (16, 64) and row["kernel"] not in few:
            assert row["mma"] == "HGMMA", row
        waits = row["kernel"] in PASSES and row["variant"] != "scaled" and row["rank"] == 16
        if half and waits and row["target"] in ("sm_80", "sm_90"):
            assert _blocks_at_once(row) >= 2, row


def _third(i: int) -> set[str]:
    return set(sorted(_kernels(16))[i::3])


NO_RANK = {*NO_MATMUL, *CHAIN, "invariant_linear", "dequantize"}


# Every kernel on one target, a third of them on each other one; where the branch is wider its tile is
# another: at the widest rank that a kernel takes.
@pytest.mark.parametrize(
    ("target", "rank", "kernels"),
    [
        ("sm_90", 16, _kernels(16)),
        ("sm_90", 64, _kernels(64) - _kernels(512)),
        ("sm_90", 512, _kernels(512) - NO_RANK),
        ("sm_80", 16, _third(0)),
        ("sm_100", 16, {*_third(1), "kext"}),  # whose products and copies are its own there
        ("gfx942", 16, _third(2)),
    ],
    ids=lambda part: f"{len(part)} kernels" if isinstance(part, set) else str(part),
)
def test_each_kernel_once(target, rank, kernels):
    rows = _inspect(
        "--once", "--target", target, f"--rank={rank}", *(f"--kernel={name}" for name in sorted(kernels))
    )
    assert {row["kernel"] for row in rows} == kernels
    _check_all(rows)


def test_the_thirds_are_all_kernels():
    assert set.union(*map(_third, range(3))) == _kernels(16) >= NO_RANK
    assert _kernels(16) - NO_RANK <= _kernels(64) | _kernels(512)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_half_precision(target, rank):
    rows = _inspect("--target", target, "--rank", str(rank))
    assert {row["kernel"] for row in rows} == _kernels(rank)
    _check_all(rows)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [16, 64])
def test_amd(rank):
    _check_all(_inspect("--target", "gfx942", "--rank", str(rank)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_float32_through_tf32(target):
    _check_all(_inspect("--target", target, "--rank", "16", "--rank", "64", "--dtype", "fp32"))
