"""A warm-up at a high rank: the cut is the best there is, and what is cut off stays zero."""

from __future__ import annotations

import pytest
import torch
from optim_models import batch, ours
from schedule_cases import adam, fresh, run

from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import DyLoRASampler, RankWarmup, compact, shrink_rank


@pytest.mark.parametrize("shape", [(9, 12), (12, 9), (3, 20)])
def test_the_cut_is_the_nearest_of_its_rank(shape):
    torch.manual_seed(0)
    a, b = torch.randn(4, shape[1], dtype=torch.float64), torch.randn(shape[0], 4, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    for rank in (1, 2, 3):
        small_a, small_b = shrink_rank(a, b, rank)
        assert small_a.shape == (rank, shape[1]) and small_b.shape == (shape[0], rank)
        torch.testing.assert_close(small_b @ small_a, u[:, :rank] * s[:rank] @ vh[:rank])
        torch.testing.assert_close(small_a @ small_a.T, small_b.T @ small_b)  # balanced
    whole = min(4, *shape)
    torch.testing.assert_close(torch.mm(*shrink_rank(a, b, whole)[::-1]), b @ a)


def test_after_the_warm_up_the_low_rank_trains_alone():
    model = fresh(torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = RankWarmup(model, optimizer, r_lo=2, steps=3)
    run(model, optimizer, schedule, 2)
    before = [pair.lora_b @ pair.lora_a for pair in lora_pairs(model)]
    assert all(torch.linalg.matrix_rank(delta) > 2 for delta in before)
    run(model, optimizer, schedule, 4, first=2)
    for pair in lora_pairs(model):
        assert pair.lora_a[2:].count_nonzero() == 0 and pair.lora_b[:, 2:].count_nonzero() == 0
        assert torch.linalg.matrix_rank(pair.lora_b @ pair.lora_a) == 2
    with torch.no_grad():
        y = model(batch())
        assert set(compact(model).values()) == {2}
        torch.testing.assert_close(model(batch()), y)


def test_a_layer_of_fewer_ranks_keeps_its_own():
    model = ours(torch.float32, rank_pattern={"tall": 1})
    schedule = RankWarmup(model, adam(model), r_lo=2, steps=1)
    delta = {pair.name: (pair.lora_b @ pair.lora_a).detach() for pair in lora_pairs(model)}
    schedule.step()
    for pair in lora_pairs(model):
        if pair.name == "tall":
            torch.testing.assert_close(pair.lora_b @ pair.lora_a, delta["tall"])


def test_mixed_ranks_are_drawn_from_those_given():
    model = fresh(method="dylora")
    sampler = DyLoRASampler(model, ranks=(1, 3))
    seen = set()
    for _ in range(20):
        sampler.step()
        seen.add(sampler.rank)
    assert seen == {1, 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shrink_rank(torch.ones(2, 3), torch.ones(4, 2), 3), "rank: expected at most 2, got 3"),
        (lambda: shrink_rank(torch.ones(2, 3), torch.ones(4, 2), 0), "rank: expected at least 1, got 0"),
        (lambda: RankWarmup(fresh(), r_lo=0), "r_lo: expected at least 1, got 0"),
        (lambda: RankWarmup(fresh(), steps=0), "steps: expected at least 1, got 0"),
        (lambda: RankWarmup(fresh(method="sora")), "expected an adapter that is s · B A and no more"),
        (lambda: DyLoRASampler(fresh(method="dylora"), ranks=()), "ranks: expected at least one, got none"),
        (lambda: DyLoRASampler(fresh(method="dylora"), ranks=(9,)), r"ranks\[0\]: expected at most 4, got 9"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
