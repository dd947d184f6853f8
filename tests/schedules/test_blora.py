"""Bayesian-LoRA: the grids, the gates and their price, by expressions of our own in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from optim_models import batch, loss, ours

from lora_kernels.adapters import LoRAConfig, make
from lora_kernels.quant.gated import gated_quantise, hard_gates, open_bits, sampled_gates
from lora_kernels.schedules import BLoRA, bit_operations, blora_gate_loss

WIDE, SHIFT = torch.float64, 2 / 3 * math.log(0.1 / 1.1)
YES, NO = torch.tensor(True), torch.tensor(False)


def gates(count):
    """The first so many of four."""
    return torch.tensor([float(i < count) for i in range(4)], dtype=WIDE)


@pytest.mark.parametrize("signed", [YES, NO], ids=["signed", "unsigned"])
@pytest.mark.parametrize("count, divisor", [(0, 3), (1, 3 * 5), (2, 3 * 5 * 17), (3, 3 * 5 * 17 * 257)])
def test_the_error_is_half_a_step(signed, count, divisor):
    x = torch.linspace(-1.0 if signed else 0.0, 1.0, 2001, dtype=WIDE)
    largest = torch.tensor(1.0, dtype=WIDE)
    got = gated_quantise(x, largest, signed, gates(count), clip=True)
    step = (2.0 if signed else 1.0) / divisor
    assert (got - x).abs().max() <= step / 2 + 2e-7
    if count < 2:
        levels = (got / step).round().unique().numel()
        assert levels == {(True, 0): 3, (True, 1): 15, (False, 0): 4, (False, 1): 16}[(bool(signed), count)]


def test_the_grid_is_that_of_a_loop():
    torch.manual_seed(0)
    x, z = torch.randn(50, dtype=WIDE), torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=WIDE)
    step, left, parts = 2 * 2.5 / 3, x.clone(), []
    for bits in (2, 4, 8, 16, 32):
        parts.append(step * (left / step).round())
        left = left - parts[-1]
        step = step / (2**bits + 1)
    want = parts[0] + z[0] * (parts[1] + z[1] * (parts[2] + z[2] * (parts[3] + z[3] * parts[4])))
    torch.testing.assert_close(gated_quantise(x, torch.tensor(2.5, dtype=WIDE), YES, z), want)


def test_gradients_pass_rounding_and_reach_the_gates():
    x = torch.randn(9, dtype=WIDE, requires_grad=True)
    z = gates(2).requires_grad_()
    y = gated_quantise(x, torch.tensor(3.0, dtype=WIDE), YES, z)
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(dx, torch.ones_like(x))
    (dz,) = torch.autograd.grad(y.sum(), z)
    assert dz[:3].all() and dz[3] == 0


def test_a_gate_is_open_above_the_threshold():
    logits = torch.tensor([-6.0, -0.94, -0.93, 6.0], dtype=WIDE)
    assert hard_gates(logits).tolist() == [0, 0, 1, 1]
    for phi in (-0.94, -0.93):
        assert (1 / (1 + math.exp(-(SHIFT - phi))) < 0.34) == (phi > -0.935)


def test_sampled_gates_are_the_hard_concrete():
    u, logits = torch.rand(1000, dtype=WIDE), torch.full((1000,), 0.3, dtype=WIDE)
    want = torch.clamp(torch.sigmoid((u.log() - (1 - u).log() + 0.3) / (2 / 3)) * 1.2 - 0.1, 0, 1)
    torch.testing.assert_close(sampled_gates(logits, u), want)
    assert want.eq(0).any() and want.eq(1).any()
    assert sampled_gates(torch.full_like(u, -2.0), u).eq(0).all()
    chance = sampled_gates(logits, u).gt(0).double().mean().item()
    assert chance == pytest.approx(1 / (1 + math.exp(SHIFT - 0.3)), abs=0.05)


def test_bits():
    patterns = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert open_bits(patterns).tolist() == [2, 4, 8, 16, 32]


def model(**options):
    net = ours(method="blora", **options)
    for layer in (net.wide, net.tall, net.square):
        layer.adapters["default"].bit_gates.data.normal_()
        layer.adapters["default"].rank_gates.data.normal_()
    return net


def one_of(net):
    return net.wide.adapters["default"]


def test_the_layer_is_its_quantised_factors():
    net = model(r=4).eval()
    one, x = one_of(net), torch.randn(3, 12, dtype=WIDE)
    bits = [
        gated_quantise(getattr(one, n), one.ranges[i], one.signed[i], hard_gates(one.bit_gates[i]))
        for i, n in enumerate(("lora_A", "lora_B", "lora_E"))
    ]
    rank = one.rank_gate()
    assert (
        rank[0] == 1
        and set(rank.tolist()) <= {0.0, 1.0}
        and rank.tolist() == sorted(rank.tolist(), reverse=True)
    )
    branch = one.scaling * ((x @ bits[0].T) * bits[2][:, 0] * rank) @ bits[1].T
    torch.testing.assert_close(net.wide(x), F.linear(x, net.wide.weight, net.wide.bias) + branch)


def test_noise_counts_in_training_alone_and_warm_up_is_plain():
    net = model()
    one = one_of(net)
    schedule = BLoRA(net, warmup=2)
    plain = one.scaling * one.lora_B @ torch.diag(one.lora_E[:, 0]) @ one.lora_A
    torch.testing.assert_close(one.delta(), plain)
    schedule.step()
    assert not one.quantising
    schedule.step()
    assert one.quantising
    drawn = one.delta()
    torch.testing.assert_close(one.delta(), drawn)  # the same draw all through a step
    schedule.step()
    assert not torch.equal(one.delta(), drawn)
    net.eval()
    fixed = one.delta()
    schedule.step()
    assert torch.equal(one.delta(), fixed)


def pi(phi):
    return 1 / (1 + math.exp(-(float(phi) - SHIFT)))


def test_the_price_of_gates():
    net = model()
    want = 0.0
    for layer in (net.wide, net.tall, net.square):
        one = layer.adapters["default"]
        price = [1 + pi(a) * (1 + pi(b) * (1 + pi(c) * (1 + pi(d)))) for a, b, c, d in one.bit_gates.tolist()]
        ranks = sum(pi(phi) for phi in one.rank_gates[1:].tolist()) / (one.r - 1)
        want += price[0] + price[1] + ranks * price[2]
    got = blora_gate_loss(net)
    assert got.item() == pytest.approx(want)
    got.backward()
    BLoRA(net, warmup=1)
    assert blora_gate_loss(net) == 0
    BLoRA(net, warmup=1)
    assert blora_gate_loss(net) == 0
    assert one_of(net).bit_gates.grad.gt(0).all()
    assert one_of(net).rank_gates.grad[0] == 0 and one_of(net).rank_gates.grad[1:].gt(0).all()


def test_operations_of_what_is_open():
    net = ours(method="blora", target_modules=["wide"])
    one = one_of(net)
    assert bit_operations(net) == 4 * 32 * 32 * (12 + 20 + 1)
    with torch.no_grad():
        one.rank_gates[2:] = -3.0
        one.bit_gates[0, 1:] = -3.0
    assert bit_operations(net, 16) == 2 * 16 * (4 * 12 + 32 * 20 + 32)


def test_a_step_trains_gates_and_factors():
    net = model()
    schedule = BLoRA(net)
    (loss(net) + 1e-3 * blora_gate_loss(net)).backward()
    one = one_of(net)
    assert all(getattr(one, name).grad.any() for name in ("lora_A", "lora_B", "lora_E", "bit_gates"))
    assert not one.ranges.requires_grad and schedule.noise["wide"].shape == (12 + 3,)
    learnt = make(4, 4, LoRAConfig(r=2, method="blora", method_options={"learn_ranges": True, "clip": True}))
    assert learnt.ranges.requires_grad
    assert net(batch()).isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match="warmup: expected 0 <= warmup, got -1"):
        BLoRA(model(), warmup=-1)
    for call in (blora_gate_loss, bit_operations):
        with pytest.raises(ValueError, match=r"model: expected adapters of .*'blora'\), got none"):
            call(ours())
    with pytest.raises(ValueError, match="clip: expected one of"):
        make(4, 4, LoRAConfig(method="blora", method_options={"clip": 3}))
