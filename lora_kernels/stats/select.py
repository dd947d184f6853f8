"""Which blocks or neurons of a model train: the choices of SMT and NeFT, ready for ``method_options``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What a block's entries [..., l, l] count for.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_abs": lambda blocks: blocks.mean((-2, -1)).abs(),
    "abs_mean": lambda blocks: blocks.abs().mean((-2, -1)),
    "l1": lambda blocks: blocks.abs().sum((-2, -1)),
    "l2": lambda blocks: blocks.square().sum((-2, -1)).sqrt(),
}
AXES = {"up_proj": "rows", "down_proj": "columns"}


def select_blocks(
    gradients: Mapping[str, Any],
    count: int,
    block: int = 256,
    *,
    score: str = "mean_abs",
    per_layer: bool = False,
) -> dict[str, list[tuple[int, int]]]:
    """The ``count`` blocks of ``block`` × ``block`` whose gradients score highest, by layer

    Sparse Matrix Tuning (He et al., 2024, arXiv 2405.15525). Scores: ``mean_abs``, |mean G| (its default,
    the absolute value of the mean); ``abs_mean``, mean |G|; ``l1``; ``l2``.

    Args:
        gradients: dotted name of a layer -> G ``[out, in]``, or what :func:`lora_kernels.calibrate` gathered
            with ``collect=("gradient",)``.
        count: blocks, of all layers together.
        block: side of a block; it divides the sides of each G.
        score: one of the above.
        per_layer: whether ``count`` is of each layer by itself.

    Returns:
        Name -> pairs (i, j), of the layers that have any: ``LoRAConfig(method="smt", target_modules=[*found],
        method_options={"block": block, "blocks": found})``.

    Raises:
        ValueError: an unknown score, fewer blocks than ``count``, or a side that is not whole blocks.

    Examples:
        >>> gradient = torch.zeros(4, 4)
        >>> gradient[2:, :2] = 1
        >>> select_blocks({"layer": gradient}, count=1, block=2)
        {'layer': [(1, 0)]}
    """
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    scores = {name: SCORES[score](_blocks(name, given, block)) for name, given in gradients.items()}
    groups = [{name: one} for name, one in scores.items()] if per_layer else [scores]
    found: dict[str, list[tuple[int, int]]] = {}
    for group in groups:
        for name, at in _lowest({name: -one for name, one in group.items()}, count, "count"):
            found.setdefault(name, []).append(divmod(at, scores[name].shape[1]))
    return found


def select_neurons(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    fraction: float = 0.05,
    *,
    axes: Mapping[str, str] = AXES,
) -> dict[str, dict[str, list[int]]]:
    """The neurons whose direction a short training of the whole model changed most

    NeFT (Xu et al., 2024, arXiv 2403.11621): those of lowest cosine between the weights before and after. A
    neuron is a row of an up-projection or a column of a down-projection.

    Args:
        before: dotted name of a layer (with ``.weight`` behind it or without) -> W ``[out, in]``; others are
            left alone. A state dict does.
        after: the same after training.
        fraction: the share of all neurons to choose, in (0, 1].
        axes: last part of a layer's name -> ``"rows"`` or ``"columns"``.

    Returns:
        ``{"rows": {name: numbers}, "columns": {name: numbers}}``, the ``method_options`` of ``neft``, for the
        layers that have any.

    Raises:
        ValueError: a fraction out of range, no neurons, or weights that do not match.

    Examples:
        >>> before, after = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> select_neurons({"up_proj": before}, {"up_proj": after}, fraction=0.5)
        {'rows': {'up_proj': [1]}}
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction: expected 0 < fraction <= 1, got {fraction}")
    cosines, kinds = {}, {}
    for key, weight in before.items():
        name = key.removesuffix(".weight")
        kind = axes.get(name.rpartition(".")[2])
        if kind is None or weight.dim() != 2:
            continue
        if key not in after or after[key].shape != weight.shape:
            raise ValueError(f"after: expected a weight of shape {tuple(weight.shape)} for {key}, got none")
        dim = 1 if kind == "rows" else 0
        cosines[name], kinds[name] = F.cosine_similarity(weight.double(), after[key].double(), dim), kind
    total = sum(one.numel() for one in cosines.values())
    if not total:
        raise ValueError(f"before: expected weights of layers named {', '.join(axes)}, got none")
    found: dict[str, dict[str, list[int]]] = {}
    for name, at in _lowest(cosines, max(1, round(fraction * total)), "fraction"):
        found.setdefault(kinds[name], {}).setdefault(name, []).append(at)
    return found


@torch.no_grad()
def energy_ranks(weights: Mapping[str, Tensor], mean_rank: int) -> dict[str, int]:
    """r_l ← r_l + 1 where E_l = Σ_{i≤r_l} σ_i² / Σ_i σ_i² is least, until their mean is ``mean_rank``

    LaMDA++'s ranks by the energy of each W's spectrum (Azizi et al., 2024, arXiv 2406.12832): a flat one gets
    more. The paper's exact rule is not known; this gives all layers about the same energy. For
    ``LoRAConfig(method="lamda", rank_pattern=…)``.

    Args:
        weights: name -> W, a matrix.
        mean_rank: at least 1, and at most what the smaller sides allow on average.

    Raises:
        ValueError: no weights, one that is no matrix or is zero, or a mean out of range.

    Examples:
        >>> steep = torch.diag(torch.tensor([9.0, 1, 1, 1]))
        >>> energy_ranks({"flat": torch.eye(4), "steep": steep}, mean_rank=2)
        {'flat': 3, 'steep': 1}
    """
    energies: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.dim() != 2 or not weight.any():
            raise ValueError(
                f"weights: {name}: expected a matrix that is not zero, got {tuple(weight.shape)}"
            )
        squares = torch.linalg.svdvals(weight.double()).square().cpu()
        energies[name] = squares.cumsum(0) / squares.sum()
    most = sum(len(one) for one in energies.values())
    if not 1 <= mean_rank * len(energies) <= most or mean_rank < 1:
        raise ValueError(f"mean_rank: expected 1 to {most // max(len(energies), 1)}, got {mean_rank}")
    # The energy that a layer has before each rank, but for the first, that all have.
    before = torch.cat([one[:-1] for one in energies.values()])
    owners = [name for name, one in energies.items() for _ in range(len(one) - 1)]
    ranks = dict.fromkeys(energies, 1)
    for at in before.argsort(stable=True)[: (mean_rank - 1) * len(energies)].tolist():
        ranks[owners[at]] += 1
    return ranks


def _blocks(name: str, given: Any, block: int) -> Tensor:
    """G as [rows of blocks, columns of blocks, l, l]."""
    gradient: Tensor = given["gradient"] if isinstance(given, Mapping) else given
    if block < 1 or gradient.dim() != 2 or any(side % block for side in gradient.shape):
        raise ValueError(f"block: expected a divisor of {tuple(gradient.shape)} ({name}), got {block}")
    rows, columns = (side // block for side in gradient.shape)
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide.view(rows, block, columns, block).transpose(1, 2)


def _lowest(scores: Mapping[str, Tensor], count: int, argument: str) -> list[tuple[str, int]]:
    """Name and place of the ``count`` lowest, by layer and place; of equals the first."""
    flat = torch.cat([one.flatten().cpu() for one in scores.values()])
    if not 1 <= count <= len(flat):
        raise ValueError(f"{argument}: expected 1 to {len(flat)}, got {count}")
    chosen = flat.argsort(stable=True)[:count].sort().values.tolist()
    owners = [(name, at) for name, one in scores.items() for at in range(one.numel())]
    return [owners[at] for at in chosen]
