"""Bytes counted from the launch configuration: beta against the floor, the counts against launches."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.kernels import gate_chain, passes, traffic
from lora_kernels.planner import Plan, Problem

BACKWARD = Problem("lora_linear_backward", 8192, 4096, 4096, 16, "bf16", "sm_90", dropout=True)
FORWARD = dataclasses.replace(BACKWARD, op="lora_linear")
BETA = Plan("beta")


def counted_passes(forward, backward):
    launches = [*traffic.launches(forward, BETA), *traffic.launches(backward, BETA)]
    return {launch.name: launch for launch in launches if launch.name != "gemm"}


def test_the_passes_of_beta_stay_within_a_tenth_of_the_floor():
    counted = counted_passes(FORWARD, BACKWARD)
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
    for launch in counted_passes(FORWARD, BACKWARD).values():
        assert launch.requested <= 1.25 * launch.memory, launch


def test_wide_ranks_read_dy_twice_and_split_nothing():
    wide = dataclasses.replace(BACKWARD, rank=128)
    assert traffic.dy_pass(wide, BETA).ratio < 2.0


@pytest.mark.parametrize("rank", (4, 17))
def test_the_parts_counted_are_the_parts_allocated(rank, device, monkeypatch):
    problem = Problem("lora_linear_backward", 70, 200, 300, rank, "fp32", "cpu")
    summed = []
    monkeypatch.setattr(passes, "sum_parts", lambda parts, dtype, scale: summed.append(parts.nbytes))
    dy, b = torch.randn(70, 300, device=device), torch.randn(300, rank, device=device)
    h, a = torch.randn(70, rank, device=device), torch.randn(rank, 200, device=device)
    passes.dy_pass(dy, b, h, None, 1.0)
    counted = traffic.dy_pass(problem, BETA)
    assert counted.memory == counted.floor + 2 * sum(summed)
    summed.clear()
    passes.x_pass(torch.randn(70, 200, device=device), h, a, None, 0.0, True)
    counted = traffic.x_pass(problem, BETA)
    assert counted.memory == counted.floor + 2 * sum(summed)


def test_a_plan_changes_the_count():
    narrow = Plan("beta", {"dy": {"block_c": 128}})
    assert traffic.dy_pass(BACKWARD, narrow).memory > 1.2 * traffic.dy_pass(BACKWARD, BETA).memory


def test_a_chain_of_gates_moves_a_few_passes():
    """Composed a step moves 85 passes over one activation; what it reads and writes at the least is 4."""
    one = 8192 * 4096 * 2
    counted = traffic.gate_chain(8192, 4096, 4096, (8, 8, 8, 8), "bf16")
    assert [c.name for c in counted] == ["chain y", "chain dX", "grads 0-1", "grads 2-3", "grads 4-5"]
    assert all(c.ratio <= 1.2 for c in counted)
    assert sum(c.memory for c in counted) <= 10.7 * one
    assert all(c.requested <= 2.0 * c.memory for c in counted[:2])


def test_the_parts_of_gates_counted_are_the_parts_allocated(device, monkeypatch):
    summed, original = [], gate_chain.sum_parts

    def spy(parts, dtype, scale):
        summed.append(parts.nbytes)
        return original(parts, dtype, scale)

    monkeypatch.setattr(gate_chain, "sum_parts", spy)
    dims, x = (4, 4, 4), torch.randn(70, 64, device=device)
    gates = [torch.randn(16, 16, device=device) for _ in range(3)]
    grads = [torch.empty_like(gate) for gate in gates]
    gate_chain.gate_chain_backward(x, x, gates, dims, None, True, grads)
    counted = [c for c in traffic.gate_chain(70, 64, 64, dims, "fp32") if "grads" in c.name]
    assert [c.memory - c.floor for c in counted] == [2 * size for size in summed]
