"""PeriodicLoRA: both ways to unload."""

from __future__ import annotations

import pytest
import torch
from optim_models import batch, ours
from schedule_cases import adam, fresh, run

from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import PeriodicLoRA


def trained(**options):
    model = fresh(torch.float64)
    optimizer = adam(model)
    schedule = PeriodicLoRA(model, optimizer, every=4, **options)
    run(model, optimizer, schedule, 3)
    return model, optimizer, schedule


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_unloading_keeps_the_function_and_forgets(momentum):
    model, optimizer, schedule = trained(momentum=momentum)
    y = model(batch())
    before = {pair.name: (pair.lora_a.clone(), pair.lora_b.clone()) for pair in lora_pairs(model)}
    schedule.step()
    torch.testing.assert_close(model(batch()), y, rtol=1e-12, atol=1e-12)
    for pair in lora_pairs(model):
        lora_a, lora_b = before[pair.name]
        assert torch.equal(pair.lora_b, momentum * lora_b)
        assert torch.equal(pair.lora_a, lora_a) == bool(momentum)
        assert pair.lora_a not in optimizer.state and pair.lora_b not in optimizer.state
    assert dict(model.named_parameters())["norm.weight"] in optimizer.state


def test_the_public_code_scales_the_update():
    """B A ends up m + (1-m)² of itself."""
    model, _, schedule = trained(momentum=0.3, mode="mytransformers")
    before = {p.name: p.scaling * (p.lora_b @ p.lora_a).detach() for p in lora_pairs(model)}
    starts = {p.name: p.weight.clone() for p in lora_pairs(model)}
    schedule.step()
    for pair in lora_pairs(model):
        total = pair.weight - starts[pair.name] + pair.scaling * pair.lora_b @ pair.lora_a
        torch.testing.assert_close(total, 0.79 * before[pair.name], rtol=1e-12, atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="momentum: expected 0 <= momentum < 1, got 1"):
        PeriodicLoRA(ours(), momentum=1)
    with pytest.raises(ValueError, match="mode: expected one of preserving, mytransformers, got 'all'"):
        PeriodicLoRA(ours(), mode="all")
