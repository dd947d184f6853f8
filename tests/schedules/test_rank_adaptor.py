"""RankAdaptor's search against every configuration of a small grid."""

from __future__ import annotations

import itertools
import math

import pytest

from lora_kernels.schedules import Profile, search_ranks

CHOICES = (2, 4, 6, 8, 10, 12)
PROFILES = [Profile("a", 16, 16, CHOICES), Profile("b", 16, 48, CHOICES), Profile("c", 32, 32, CHOICES)]
WEIGHTS = {"a": 5.0, "b": 1.0, "c": 2.0}
BUDGET = sum(8 * (one.in_features + one.out_features) for one in PROFILES)


def score(ranks):
    return sum(WEIGHTS[name] * math.log1p(rank) for name, rank in ranks.items())


def cost(ranks):
    return sum(ranks[one.name] * (one.in_features + one.out_features) for one in PROFILES)


def test_it_comes_near_the_best_within_the_budget():
    seen = []

    def evaluate(ranks):
        seen.append(ranks)
        return score(ranks)

    found = search_ranks(PROFILES, BUDGET, evaluate, seed=0)
    every = (dict(zip("abc", ranks, strict=True)) for ranks in itertools.product(CHOICES, repeat=3))
    best = max(score(ranks) for ranks in every if cost(ranks) <= BUDGET)
    assert score(found) >= 0.98 * best and score(found) > score(dict.fromkeys("abc", 8))
    assert len(seen) == 16 == len({tuple(one.values()) for one in seen})
    assert all(cost(one) <= BUDGET and set(one.values()) <= set(CHOICES) for one in seen)


def test_a_seed_gives_a_search():
    found = [search_ranks(PROFILES, BUDGET, score, rounds=2, seed=0) for _ in range(2)]
    assert found[0] == found[1]


def test_a_grid_that_is_used_up_ends_the_search():
    one = [Profile("a", 4, 4, (1, 2))]
    assert search_ranks(one, 100, lambda ranks: -ranks["a"]) == {"a": 1}


def test_bad_input():
    with pytest.raises(ValueError, match="profiles: expected at least one layer, got none"):
        search_ranks([], 1, score)
    with pytest.raises(ValueError, match="budget: expected at least the 320 of the least ranks, got 319"):
        search_ranks(PROFILES, 319, score)
    with pytest.raises(ValueError, match=r"profiles: a: expected ranks of at least 1, got \(\)"):
        search_ranks([Profile("a", 1, 1, ())], 1, score)
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        search_ranks(PROFILES, BUDGET, score, rounds=0)
