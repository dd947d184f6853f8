"""Bytes counted from the launch configuration: beta against the floor, the counts against launches."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.kernels import beta, traffic
from lora_kernels.planner import Plan, Problem

BACKWARD = Problem("lora_linear_backward", 8192, 4096, 4096, 16, "bf16", "sm_90", dropout=True)
FORWARD = dataclasses.replace(BACKWARD, op="lora_linear")
BETA = Plan("beta")


def passes(forward, backward):
    launches = [*traffic.launches(forward, BETA), *traffic.launches(backward, BETA)]
    return {launch.name: launch for launch in launches if launch.name != "gemm"}


def test_the_passes_of_beta_stay_within_a_tenth_of_the_floor():
    counted = passes(FORWARD, BACKWARD)
    assert set(counted) == {"branch_pass", "dy_pass", "x_pass"}
    together = sum(p.memory for p in counted.values()) / sum(p.floor for p in counted.values())
    assert together <= 1.1
    assert counted["branch_pass"].ratio <= 1.02
    assert counted["x_pass"].ratio <= 1.02
    # A sum over N (U) and one over M (dB) in a single reading: with P programs that share nothing, the
    # parts are at least 16 r sqrt(P M N) bytes, written and read. The pass comes within 2 % of that.
    least = 16 * 16 * (128 * 8192 * 4096) ** 0.5
    dy = counted["dy_pass"]
    assert dy.memory - dy.floor <= 1.02 * least
    assert dy.ratio <= 1.26


def test_no_pass_asks_for_much_more_than_it_moves():
    for launch in passes(FORWARD, BACKWARD).values():
        assert launch.requested <= 1.25 * launch.memory, launch


def test_wide_ranks_read_dy_twice_and_split_nothing():
    wide = dataclasses.replace(BACKWARD, rank=128)
    assert traffic.dy_pass(wide, BETA).ratio < 2.0


@pytest.mark.parametrize("rank", (4, 17))
def test_the_parts_counted_are_the_parts_allocated(rank, device, monkeypatch):
    problem = Problem("lora_linear_backward", 70, 200, 300, rank, "fp32", "cpu")
    summed = []
    monkeypatch.setattr(beta, "sum_parts", lambda parts, dtype, scale: summed.append(parts.nbytes))
    dy, b = torch.randn(70, 300, device=device), torch.randn(300, rank, device=device)
    h, a = torch.randn(70, rank, device=device), torch.randn(rank, 200, device=device)
    beta.dy_pass(dy, b, h, None, 1.0)
    counted = traffic.dy_pass(problem, BETA)
    assert counted.memory == counted.floor + 2 * sum(summed)
    summed.clear()
    beta.x_pass(torch.randn(70, 200, device=device), h, a, None, 0.0, True)
    counted = traffic.x_pass(problem, BETA)
    assert counted.memory == counted.floor + 2 * sum(summed)


def test_a_plan_changes_the_count():
    narrow = Plan("beta", {"dy": {"block_c": 128}})
    assert traffic.dy_pass(BACKWARD, narrow).memory > 1.2 * traffic.dy_pass(BACKWARD, BETA).memory
