"""AdaLoRA step for step as PEFT does it."""

from __future__ import annotations

import pytest
import torch
from optim_models import batch, loss, net, ours

from lora_kernels.nn import lora_layers
from lora_kernels.schedules import AdaLoRA, adalora_penalty, compact

TARGETS = ["wide", "tall", "square"]
PHASES = {"target_r": 2, "tinit": 2, "tfinal": 3, "beta1": 0.8, "beta2": 0.7}
TOTAL = 12


def model():
    return ours(r=4, method="adalora", init_lora_weights=True)


def twins():
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=4, lora_alpha=6, target_modules=TARGETS, total_step=TOTAL, deltaT=2, **PHASES
    )
    theirs = peft.get_peft_model(net(), config).double()
    mine = model()
    with torch.no_grad():
        for name in TARGETS:
            other = getattr(theirs.base_model.model, name)
            own = getattr(mine, name).adapters["default"]
            for factor in ("lora_A", "lora_B", "lora_E"):
                getattr(own, factor).copy_(getattr(other, factor)["default"])
    return theirs, mine


def test_it_is_peft_step_for_step():
    theirs, mine = twins()
    schedule = AdaLoRA(mine, TOTAL, delta_t=2, **PHASES)
    optimizers = [
        torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.3) for one in (theirs, mine)
    ]
    for step in range(1, TOTAL + 1):
        for one, optimizer in zip((theirs, mine), optimizers, strict=True):
            optimizer.zero_grad()
            loss(one, step).backward()
            optimizer.step()
        if step == TOTAL - PHASES["tfinal"]:  # where PEFT also cuts its factors
            theirs.base_model.rankallocator.update_and_allocate(
                theirs.base_model.model, step, force_mask=True
            )
        elif step < TOTAL - PHASES["tfinal"]:
            theirs.base_model.update_and_allocate(step)
        else:
            break
        schedule.step()
        for name in TARGETS:
            own = getattr(mine, name).adapters["default"]
            other = getattr(theirs.base_model.model, name)
            for factor in ("lora_A", "lora_B", "lora_E"):
                got, want = getattr(own, factor), getattr(other, factor)["default"]
                torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(mine(batch()), theirs(batch()), rtol=1e-7, atol=1e-9)
    ranks = [int(kept.sum()) for kept in schedule.kept.values()]
    assert sum(ranks) == 2 * len(TARGETS)


def test_the_budget_and_what_stays():
    mine = model()
    schedule = AdaLoRA(mine, TOTAL, delta_t=2, **PHASES)
    budgets = [schedule.budget(step) for step in range(1, TOTAL + 1)]
    assert budgets[:2] == [(12, False)] * 2
    assert [b for b, _ in budgets] == sorted((b for b, _ in budgets), reverse=True)
    assert budgets[8] == (6, True) and budgets[9:] == [(6, False)] * 3
    optimizer = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=1e-2)
    for step in range(TOTAL):
        optimizer.zero_grad()
        (loss(mine, step) + 0.5 * adalora_penalty(mine)).backward()
        optimizer.step()
        schedule.step()
    y = mine(batch())
    ranks = compact(mine)
    torch.testing.assert_close(mine(batch()), y, rtol=1e-12, atol=1e-12)
    want = {name: max(1, int(kept.sum())) for name, kept in schedule.kept.items()}
    assert ranks == want and sum(int(kept.sum()) for kept in schedule.kept.values()) == 6


def test_the_penalty_is_that_of_peft():
    theirs, mine = twins()
    norms = [
        torch.norm((p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(4, dtype=torch.float64), p="fro")
        for name, p in theirs.named_parameters()
        if "lora_A" in name or "lora_B" in name
    ]
    torch.testing.assert_close(adalora_penalty(mine), sum(norms) / len(norms))


def test_bad_input():
    with pytest.raises(ValueError, match="model: expected adapters of LoRAConfig"):
        AdaLoRA(ours(), 10)
    with pytest.raises(ValueError, match="total_steps: expected more than tinit \\+ tfinal = 10, got 10"):
        AdaLoRA(model(), 10, target_r=2, tinit=5, tfinal=5)
    with pytest.raises(ValueError, match="target_r: expected at most the mean rank of the adapters, got 5"):
        AdaLoRA(model(), 10, target_r=5)
    with pytest.raises(ValueError, match="beta1: expected 0 < beta1 < 1, got 1"):
        AdaLoRA(model(), 10, target_r=2, beta1=1)
    schedule = AdaLoRA(model(), 10, target_r=2)
    with pytest.raises(ValueError, match=r"model: wide.lora_A: expected a gradient"):
        schedule.step()
    assert schedule.steps == 0


def test_the_gradient_of_the_penalty_is_autograds():
    mine = model()
    adapters = [layer.adapters["default"] for layer in lora_layers(mine).values()]
    factors = [one.lora_A for one in adapters] + [one.lora_B for one in adapters]
    with torch.no_grad():
        for factor in factors:
            factor.normal_()
    sides = [one.lora_A for one in adapters] + [one.lora_B.T for one in adapters]
    norms = [(side @ side.T - torch.eye(len(side))).norm() for side in sides]
    want = torch.autograd.grad(sum(norms) / len(norms), factors)
    for got, one in zip(torch.autograd.grad(adalora_penalty(mine), factors), want, strict=True):
        torch.testing.assert_close(got, one)
    with torch.no_grad():
        for one in adapters:
            for side in (one.lora_A, one.lora_B.T):
                side.zero_()[range(len(side)), range(len(side))] = 1.0
    assert all(not grad.any() for grad in torch.autograd.grad(adalora_penalty(mine), factors))
