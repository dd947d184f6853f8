"""Every kernel compiled for each target with no card: no spill, tensor cores, wide loads."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

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
    assert row["spills"] == 0, f"{name} spills {row['spills']} bytes"
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


@pytest.mark.parametrize("rank", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_half_precision(target, rank):
    rows = _inspect("--target", target, "--rank", str(rank))
    narrow = {*GATHER, *GROUP, *SMALL, "kext"} if rank <= 64 else set()
    narrow |= {"single"} if rank <= 128 else set()
    codes = {16: CODES, 64: {"quantized"}}.get(rank, set())
    usual = {"forward", "dy_pass", "x_pass", "low_rank_norm", "invariant_linear"}
    assert {row["kernel"] for row in rows} == {*usual, *narrow, *codes, *NO_MATMUL}
    for row in rows:
        _check(row)
        if rank == 16 and row["kernel"] in PASSES and row["variant"] != "scaled" and target != "100":
            assert _blocks_at_once(row) >= 2, row


@pytest.mark.parametrize("rank", [16, 64])
def test_amd(rank):
    for row in _inspect("--target", "gfx942", "--rank", str(rank)):
        _check(row)


@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_float32_through_tf32(target):
    for row in _inspect("--target", target, "--rank", "16", "--rank", "64", "--dtype", "fp32"):
        _check(row)


def test_low_ranks_use_hopper_warpgroup_matmuls():
    rows = _inspect("--target", "90", "--rank", "16", "--rank", "64")
    # Sixteen rows, of one adapter, of a weight or in all, are fewer than a warpgroup's matmul takes.
    few = GATHER | CODES | GROUP | {"low_rank_norm", "single", "invariant_linear"}
    kinds = {row["mma"] for row in rows if row["kernel"] not in NO_MATMUL | SMALL | few}
    assert kinds == {"HGMMA"}
