"""RankAdaptor: each layer's rank, found by a small network that guesses a configuration's score."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..optim._common import check_count

_WIDTH, _EPOCHS, _RATE = 32, 200, 1e-2
# Draws that may be over the budget before a search gives up.
_TRIES = 1000


class Profile(NamedTuple):
    """A layer that gets a rank: its name, its sizes and the ranks to choose from."""

    name: str
    in_features: int
    out_features: int
    choices: tuple[int, ...]


def search_ranks(
    profiles: Sequence[Profile],
    budget: int,
    evaluate: Callable[[dict[str, int]], float],
    *,
    init: int = 8,
    rounds: int = 8,
    candidates: int = 64,
    seed: int = 0,
) -> dict[str, int]:
    """argmax of score(r) over r with Σ r_l (in_l + out_l) ≤ budget, by few measured configurations

    RankAdaptor (Zhou et al., 2024, arXiv 2406.15734): ``init`` random configurations are measured, then each
    round a network of three layers of 32 learns score from ranks, and of ``candidates`` new ones the one that
    it likes best is measured. The network is a third party's reading of the paper. Give the result to
    ``LoRAConfig(rank_pattern=…)``.

    Args:
        profiles: the layers.
        budget: how many numbers may train, such as Σ 8 (in_l + out_l).
        evaluate: fine-tunes with these ranks and scores the model, higher being better.
        init: random configurations at the start.
        rounds: measured guesses after them.
        candidates: configurations that the network compares in a round.
        seed: of every draw.

    Returns:
        The best that was measured: name -> rank.

    Raises:
        TypeError: a number is no int.
        ValueError: no profiles, one without choices, or a budget below the least ranks.

    Examples:
        >>> profile = Profile("0", 8, 8, (2, 4))
        >>> search_ranks([profile], budget=64, evaluate=lambda ranks: ranks["0"], init=2, rounds=1)
        {'0': 4}
    """
    for name, value in (("init", init), ("rounds", rounds), ("candidates", candidates), ("budget", budget)):
        check_count(name, value)
    _check(profiles, budget)
    rng = torch.Generator().manual_seed(seed)
    measured: dict[tuple[int, ...], float] = {}
    names = [one.name for one in profiles]

    def measure(ranks: tuple[int, ...]) -> None:
        measured[ranks] = float(evaluate(dict(zip(names, ranks, strict=True))))

    for ranks in _feasible(profiles, budget, init, rng, measured):
        measure(ranks)
    for _ in range(rounds):
        new = _feasible(profiles, budget, candidates, rng, measured)
        if not new:
            break
        guesses = _guesser(profiles, measured, rng)(_scaled(profiles, new))
        measure(new[int(guesses.argmax())])
    best = max(measured, key=lambda ranks: measured[ranks])
    return dict(zip(names, best, strict=True))


def _check(profiles: Sequence[Profile], budget: int) -> None:
    if not profiles:
        raise ValueError("profiles: expected at least one layer, got none")
    for one in profiles:
        if not one.choices or min(one.choices) < 1:
            raise ValueError(f"profiles: {one.name}: expected ranks of at least 1, got {one.choices}")
    least = _cost(profiles, [min(one.choices) for one in profiles])
    if budget < least:
        raise ValueError(f"budget: expected at least the {least} of the least ranks, got {budget}")


def _cost(profiles: Sequence[Profile], ranks: Sequence[int]) -> int:
    return sum(r * (one.in_features + one.out_features) for r, one in zip(ranks, profiles, strict=True))


def _feasible(
    profiles: Sequence[Profile],
    budget: int,
    count: int,
    rng: torch.Generator,
    known: dict[tuple[int, ...], float],
) -> list[tuple[int, ...]]:
    """Up to ``count`` new configurations within the budget: drawn at random, then lowered until they fit."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(_TRIES):
        if len(found) == count:
            break
        ranks = [_pick(one.choices, rng) for one in profiles]
        while _cost(profiles, ranks) > budget:
            place = _pick(range(len(ranks)), rng)
            ranks[place] = max((r for r in profiles[place].choices if r < ranks[place]), default=ranks[place])
        if tuple(ranks) not in known:
            found[tuple(ranks)] = None
    return list(found)


def _pick(values: Sequence[int], rng: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (), generator=rng))]


def _scaled(profiles: Sequence[Profile], configurations: Sequence[tuple[int, ...]]) -> Tensor:
    """Ranks over the largest of each layer."""
    largest = torch.tensor([float(max(one.choices)) for one in profiles])
    return torch.tensor(configurations, dtype=torch.float32) / largest


def _guesser(
    profiles: Sequence[Profile], measured: dict[tuple[int, ...], float], rng: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """A network that was fitted to what was measured, over its mean and spread."""
    sizes = [len(profiles), _WIDTH, _WIDTH, _WIDTH, 1]
    layers: list[nn.Module] = []
    for size, width in itertools.pairwise(sizes):
        layer = nn.Linear(size, width)
        for parameter in layer.parameters():
            parameter.data.uniform_(-(size**-0.5), size**-0.5, generator=rng)
        layers += [layer, nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    x, y = _scaled(profiles, list(measured)), torch.tensor(list(measured.values()))
    y = (y - y.mean()) / y.std().clamp(min=1e-6) if len(y) > 1 else y * 0
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    with torch.enable_grad():
        for _ in range(_EPOCHS):
            optimizer.zero_grad()
            (network(x)[:, 0] - y).square().mean().backward()
            optimizer.step()
    return lambda rows: network(rows)[:, 0].detach()
