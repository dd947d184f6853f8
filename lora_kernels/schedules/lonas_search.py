"""LoNAS's search: which sub-network of an elastic model to keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .._messages import progress
from ..nn.adapted import lora_layers
from ..nn.methods.elastic import Slice, check_slices, elastic
from ..optim._common import check_count

FIELDS = Slice._fields


class Group(NamedTuple):
    """Sizes that move together: a rank of q, k and v; a width of gate and up, and of what down reads."""

    name: str
    # The sizes to choose from.
    choices: tuple[int, ...]
    # (dotted name of a layer, "rank", "out_features" or "in_features").
    parts: tuple[tuple[str, str], ...]


class SubNetwork(NamedTuple):
    """One choice, and what it is worth."""

    # Name of each group → its size.
    sizes: dict[str, int]
    # Higher is better.
    score: float
    # Multiplications of one row through all adapted layers.
    macs: int


def slices_of(groups: Sequence[Group], sizes: Mapping[str, int]) -> dict[str, Slice]:
    """What :func:`lora_kernels.nn.elastic` takes.

    Raises:
        ValueError: a group without a size, or one of none of its choices.

    Examples:
        >>> slices_of([Group("hidden", (8, 6, 4), (("0", "out_features"),))], {"hidden": 6})["0"].out_features
        6
    """
    found: dict[str, Slice] = {}
    for group in groups:
        if sizes.get(group.name) not in group.choices:
            got = sizes.get(group.name)
            raise ValueError(f"sizes: {group.name}: expected one of {group.choices}, got {got}")
        for layer, field in group.parts:
            found[layer] = found.get(layer, Slice())._replace(**{field: sizes[group.name]})
    return found


def draw_sizes(groups: Sequence[Group], generator: torch.Generator | None = None) -> dict[str, int]:
    """A size for each group at random: what to train in a step, inside ``elastic(model, slices_of(…))``.

    Examples:
        >>> groups = [Group("hidden", (8, 6, 4), (("0", "out_features"),))]
        >>> draw_sizes(groups)["hidden"] in (8, 6, 4)
        True
    """
    return {
        one.name: one.choices[int(torch.randint(len(one.choices), (), generator=generator))] for one in groups
    }


def middle_sizes(groups: Sequence[Group]) -> dict[str, int]:
    """LoNAS's heuristic: of each group the choice ⌊(n-1)/2⌋, from the largest down.

    Examples:
        >>> middle_sizes([Group("hidden", (8, 6, 4), (("0", "out_features"),))])
        {'hidden': 6}
    """
    return {one.name: sorted(one.choices, reverse=True)[(len(one.choices) - 1) // 2] for one in groups}


def multiplications(model: nn.Module, slices: Mapping[str, Slice] | None = None) -> int:
    """Σ o · i + ρ (o + i) over all adapted layers, of the sizes in use.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 8)), LoRAConfig(2, 2, "all-linear", method="lonas"))
        >>> multiplications(model)
        56
    """
    total = 0
    for name, layer in lora_layers(model).items():
        total += _of_layer(layer, (slices or {}).get(name, Slice()))
    return total


def _of_layer(layer: Any, one: Slice) -> int:
    out_features, in_features = layer._sizes()
    outs, ins = one.out_features or out_features, one.in_features or in_features
    adapters = [layer.adapters[name] for name in layer.active]
    return outs * ins + sum((one.rank or adapter.r) * (outs + ins) for adapter in adapters)


def search_subnetworks(
    model: nn.Module,
    groups: Sequence[Group],
    evaluate: Callable[[], float],
    *,
    evaluations: int = 200,
    population: int = 8,
    seed: int = 0,
) -> list[SubNetwork]:
    """The Pareto front of score and multiplications that NSGA-II finds, fewest multiplications first

    LoNAS (Muñoz et al., LREC-COLING 2024): after training on random sub-networks (:func:`draw_sizes`), search
    those that lose least. The largest sub-network and :func:`middle_sizes` are in the first population. By
    the package ``pymoo`` (``pip install lora-kernels[search]``); where all sub-networks are no more than
    ``evaluations`` each is measured, without it.

    Args:
        model: one whose adapters are ``lonas``'s or plain LoRA's.
        groups: the sizes to choose.
        evaluate: the score of the model as it is, higher being better; called inside :func:`elastic`, without
            gradients, in evaluation mode.
        evaluations: how many sub-networks may be measured.
        population: of NSGA-II.
        seed: of NSGA-II.

    Raises:
        ImportError: ``pymoo`` is needed and not there.
        TypeError: a number is no int.
        ValueError: no groups, two of a name, one without choices, or a part that no layer has.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 8)), LoRAConfig(2, 2, "all-linear", method="lonas"))
        >>> groups = [Group("hidden", (8, 6, 4), (("0", "out_features"),))]
        >>> front = search_subnetworks(model, groups, evaluate=lambda: float(model(torch.ones(1, 4)).sum()))
    """
    for name, count in (("evaluations", evaluations), ("population", population)):
        check_count(name, count)
    _check(model, groups)
    measured: dict[tuple[int, ...], SubNetwork] = {}
    every = itertools.product(*(one.choices for one in groups))
    few = list(itertools.islice(every, evaluations + 1))
    with progress("search", min(len(few), evaluations)) as tick:

        def measure(choice: tuple[int, ...]) -> SubNetwork:
            if choice not in measured:
                measured[choice] = _measured(model, groups, choice, evaluate)
            tick()
            return measured[choice]

        if len(few) <= evaluations:
            for choice in few:
                measure(choice)
        else:
            _nsga2(groups, measure, evaluations, population, seed)
    return _front(list(measured.values()))


def _check(model: nn.Module, groups: Sequence[Group]) -> None:
    if not groups or len({one.name for one in groups}) < len(groups):
        raise ValueError(f"groups: expected some, each of its own name, got {[one.name for one in groups]}")
    for group in groups:
        if not group.choices or not group.parts:
            raise ValueError(f"groups: {group.name}: expected choices and parts, got {group}")
        for _, field in group.parts:
            if field not in FIELDS:
                raise ValueError(f"groups: {group.name}: expected one of {FIELDS}, got {field!r}")
        for size in group.choices:
            check_count(f"groups: {group.name}", size)
    check_slices(model, slices_of(groups, {one.name: max(one.choices) for one in groups}))


@torch.no_grad()
def _measured(
    model: nn.Module, groups: Sequence[Group], choice: tuple[int, ...], evaluate: Callable[[], float]
) -> SubNetwork:
    sizes = {one.name: size for one, size in zip(groups, choice, strict=True)}
    slices, modes = slices_of(groups, sizes), [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with elastic(model, slices):
            score = float(evaluate())
    finally:
        for module, mode in modes:
            module.training = mode
    return SubNetwork(sizes, score, multiplications(model, slices))


def _nsga2(
    groups: Sequence[Group],
    measure: Callable[[tuple[int, ...]], SubNetwork],
    evaluations: int,
    population: int,
    seed: int,
) -> None:
    """Runs pymoo's NSGA-II over the places of the choices."""
    try:
        import numpy as np
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import ElementwiseProblem
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.optimize import minimize
    except ImportError as error:
        raise ImportError("search_subnetworks: expected pymoo (pip install lora-kernels[search])") from error

    class Space(ElementwiseProblem):
        """Score and multiplications of a choice, as numbers to make small."""

        def __init__(self) -> None:
            most = [len(one.choices) - 1 for one in groups]
            super().__init__(n_var=len(groups), n_obj=2, xl=0, xu=np.array(most), vtype=int)

        def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            one = measure(tuple(group.choices[int(i)] for group, i in zip(groups, x, strict=True)))
            out["F"] = [-one.score, float(one.macs)]

    known = [{one.name: max(one.choices) for one in groups}, middle_sizes(groups)]
    rng = torch.Generator().manual_seed(seed)
    known += [draw_sizes(groups, rng) for _ in range(population - len(known))]
    first = [[one.choices.index(sizes[one.name]) for one in groups] for sizes in known[:population]]
    integer: dict[str, Any] = {"vtype": float, "repair": RoundingRepair()}
    algorithm = NSGA2(population, np.array(first), crossover=SBX(**integer), mutation=PM(**integer))
    minimize(Space(), algorithm, ("n_eval", evaluations), seed=seed, verbose=False)


def _front(found: list[SubNetwork]) -> list[SubNetwork]:
    """Those that no other one beats in both, fewest multiplications first."""
    front: list[SubNetwork] = []
    for one in sorted(found, key=lambda each: (each.macs, -each.score)):
        if not front or one.score > front[-1].score:
            front.append(one)
    return front
