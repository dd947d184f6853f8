"""LoRASC: the noise comes and goes, a part of each cycle stays."""

from __future__ import annotations

import pytest
import torch
from optim_models import batch, ours
from schedule_cases import adam, fresh, run

from lora_kernels import quantize_base
from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import LoRASC


def weights(model):
    return {pair.name: pair.weight.detach().clone() for pair in lora_pairs(model)}


def test_noise_is_of_its_size_and_leaves_no_trace():
    model = fresh(torch.float64)
    before = weights(model)
    schedule = LoRASC(model, None, every=4, noise=0.2)
    for name, weight in weights(model).items():
        drawn = (weight - before[name]) / (0.2 * before[name].std())
        assert 0.4 < drawn.abs().max() <= 0.5 and abs(drawn.mean()) < 0.1
    schedule.finish()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_a_cycle_is_the_loop_by_hand():
    model = fresh(torch.float64)
    before = weights(model)
    optimizer = adam(model)
    schedule = LoRASC(model, optimizer, every=4, alpha=0.5, noise=0.2)
    run(model, optimizer, schedule, 3)
    want = {
        p.name: before[p.name] + 0.5 * p.scaling * (p.lora_b @ p.lora_a).detach() for p in lora_pairs(model)
    }
    noisy = weights(model)
    schedule.step()
    assert not any(torch.equal(weight, noisy[name]) for name, weight in weights(model).items())
    schedule.finish()
    for pair in lora_pairs(model):
        torch.testing.assert_close(pair.weight, want[pair.name], rtol=1e-13, atol=1e-13)
        assert not pair.lora_b.any() and pair.lora_a not in optimizer.state


def test_all_of_it_without_noise_is_continuous():
    model = fresh(torch.float64)
    optimizer = adam(model)
    schedule = LoRASC(model, optimizer, every=4, alpha=1.0, noise=0.0)
    assert schedule.clean == {}
    run(model, optimizer, schedule, 3)
    y = model(batch())
    schedule.step()
    torch.testing.assert_close(model(batch()), y, rtol=1e-12, atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="alpha: expected at most 1, got 2"):
        LoRASC(ours(), every=1, alpha=2)
    with pytest.raises(ValueError, match="alpha: expected 0 < alpha"):
        LoRASC(ours(), every=1, alpha=0)
    model = quantize_base(ours(torch.float32), "int8", target_modules=["wide"])
    with pytest.raises(ValueError, match=r"noise: expected 0 over a quantised weight \(wide\), got 0.1"):
        LoRASC(model, every=1)
    LoRASC(model, every=1, noise=0)
