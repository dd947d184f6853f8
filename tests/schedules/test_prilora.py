"""PRILoRA: the ranks, the norms, the zeros."""

from __future__ import annotations

import pytest
import torch
from optim_models import accelerated, loss, ours
from schedule_cases import adam, fresh

from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import PRILoRA, linear_ranks


def test_ranks_rise_to_the_top():
    ranks = linear_ranks(12)
    assert (ranks[0], ranks[-1], sum(ranks) / 12) == (4, 12, 8) and ranks == sorted(ranks)
    assert linear_ranks(1, 4, 12) == [4]


@pytest.mark.parametrize("make", [lambda: fresh(torch.float64), accelerated], ids=["ours", "peft"])
def test_it_is_the_loop_by_hand(make):
    model = make()
    schedule = PRILoRA(model, every=2, ratio=0.5, beta=0.6)
    optimizer, seen, norms = adam(model), {}, {}
    for pair in lora_pairs(model):
        watch = lambda m, args, name=pair.name: seen.update({name: args[0].detach()})  # noqa: E731
        pair.layer.register_forward_pre_hook(watch)
    for step in range(1, 5):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        before = {pair.name: pair.lora_a.detach().clone() for pair in lora_pairs(model)}
        schedule.step()
        for pair in lora_pairs(model):
            now = seen[pair.name].flatten(0, -2).norm(dim=0)
            norms[pair.name] = now if step == 1 else 0.6 * norms[pair.name] + 0.4 * now
            torch.testing.assert_close(schedule.norms[f"{pair.name}:{pair.adapter}"], norms[pair.name])
            want = before[pair.name].clone()
            if step % 2 == 0:
                count = int(0.5 * want.shape[1])
                order = (want.abs() * norms[pair.name]).argsort(1)[:, :count]
                want.scatter_(1, order, 0.0)
                assert (pair.lora_a == 0).sum(1).tolist() == [count] * pair.rank
            assert torch.equal(pair.lora_a, want)


def test_what_is_evaluated_does_not_count():
    model = ours()
    schedule = PRILoRA(model)
    model.eval()
    loss(model)
    schedule.step()
    assert not any(norms.any() for norms in schedule.norms.values())
    schedule.close()
    model.train()
    loss(model)
    schedule.step()
    assert not any(norms.any() for norms in schedule.norms.values())


def test_bad_input():
    with pytest.raises(ValueError, match="ratio: expected 0 <= ratio < 1, got 1"):
        PRILoRA(ours(), ratio=1)
    with pytest.raises(ValueError, match="model: table: expected a linear, got"):
        PRILoRA(ours(target_modules=["table"]))
    with pytest.raises(ValueError, match="first: expected at least 1, got 0"):
        linear_ranks(3, 0)
