"""Delta-LoRA: the stacked form is the one in place, step for step."""

from __future__ import annotations

import pytest
import torch
from optim_models import batch, loss, ours, values

from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import DeltaLoRA

LAM, START, STEPS = 0.7, 2, 6


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def in_place(model):
    """The paper's loop on plain LoRA: W ← W + λ s (B⁺A⁺ - B A)."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for step in range(STEPS):
        before = {p.name: (p.lora_b @ p.lora_a).detach() for p in lora_pairs(model)}
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        if step >= START:
            for p in lora_pairs(model):
                p.weight.data.add_((p.lora_b @ p.lora_a).detach() - before[p.name], alpha=LAM * p.scaling)


def test_it_is_the_loop_in_place():
    plain = ours(init_lora_weights=True)
    stacked = ours(init_lora_weights=True, method="delta_lora")
    for one, other in zip(lora_pairs(plain), lora_pairs(stacked), strict=True):
        other.lora_a.data.copy_(one.lora_a)
    starts = values(stacked)
    in_place(plain)
    optimizer = torch.optim.AdamW(trained(stacked), lr=1e-2)
    schedule = DeltaLoRA(stacked, lam=LAM, start_step=START)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(stacked, step).backward()
        optimizer.step()
        schedule.step()
    for one, other in zip(lora_pairs(plain), lora_pairs(stacked), strict=True):
        torch.testing.assert_close(other.lora_a, one.lora_a, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(other.lora_b, one.lora_b, rtol=1e-10, atol=1e-11)
        assert torch.equal(other.weight, starts[f"{other.name}.weight"])
    torch.testing.assert_close(stacked(batch()), plain(batch()), rtol=1e-10, atol=1e-11)
    adapter = stacked.wide.adapters["default"]
    rank = adapter.r
    small = adapter.to_lora()
    assert small.r == 2 * rank
    torch.testing.assert_close(small.delta(), adapter.delta(), rtol=1e-12, atol=1e-12)


def test_without_lambda_it_is_lora():
    model = ours(init_lora_weights=True, method="delta_lora")
    schedule = DeltaLoRA(model, lam=0.0, start_step=0)
    assert all(not pair.layer.adapters["default"].lam.any() for pair in lora_pairs(model))
    assert len(trained(model)) == 6 and schedule.steps == 0


def test_bad_input():
    with pytest.raises(ValueError, match="model: expected adapters of LoRAConfig"):
        DeltaLoRA(ours())
    with pytest.raises(ValueError, match="lam: expected 0 <= lam, got -1"):
        DeltaLoRA(ours(method="delta_lora"), lam=-1)
    with pytest.raises(ValueError, match=r"lora_dropout: expected 0, got 0\.5"):
        DeltaLoRA(ours(method="delta_lora", lora_dropout=0.5))
