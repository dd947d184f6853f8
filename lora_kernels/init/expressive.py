"""The expressive power of LoRA: factors that make a frozen network compute another one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .base import Drawn, balanced, check_rank, register, scaling_of, statistic

if TYPE_CHECKING:
    from ..adapters.site import Site

CHANGE = "expressive"
# Beyond this condition number the inverse of a product says nothing.
_CONDITION = 1e12


class Piece(NamedTuple):
    """What one frozen layer W gets: it goes on as W + B A with another bias."""

    lora_a: Tensor  # [R, D]
    lora_b: Tensor  # [D, R]
    bias: Tensor  # [D]

    @property
    def change(self) -> Tensor:
        """B A, the statistic that ``init_lora_weights="expressive"`` starts from."""
        return self.lora_b @ self.lora_a


@register(CHANGE, needs=CHANGE, hint="make it by lora_kernels.init.expressive_network(…)[i].change")
def draw_expressive(site: Site) -> Drawn:
    """ΔW = U S Vᵀ, A = √(S_r/s) V_rᵀ, B = U_r √(S_r/s): s · B A is ΔW where its rank is at most r

    Zeng and Lee, 2023 (arXiv 2310.17513). ΔW is the statistic ``expressive`` of the site: of
    :func:`expressive_network`, or any other change of W that the adapter is to start from.
    """
    r, change = check_rank(site), statistic(site, CHANGE, site.out_features, site.in_features)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return Drawn(*balanced(u[:, :r], s[:r], vh[:r], scaling_of(site)))


def expressive_rank(width: int, depth: int, target_depth: int = 1) -> int:
    """⌈D · L̄ / L⌉: the rank with which L frozen layers, L a multiple of L̄, can be L̄ target layers.

    Examples:
        >>> expressive_rank(width=64, depth=8)
        8
    """
    for name, value in (("width", width), ("depth", depth), ("target_depth", target_depth)):
        _check_count(name, value)
    return -(-width * target_depth // depth)


@torch.no_grad()
def expressive_bound(weights: Sequence[Tensor], target: Tensor, rank: int) -> float:
    """σ_{RL+1}(T - W_L ⋯ W_1): no updates of rank R come nearer to T in the spectral norm.

    Examples:
        >>> expressive_bound([torch.eye(3), torch.eye(3)], torch.diag(torch.tensor([4.0, 3.0, 2.0])), rank=1)
        1.0
    """
    wide, goal = _square(weights, target, rank)
    values = torch.linalg.svdvals(goal - _product(wide))
    place = rank * len(wide)
    return float(values[place]) if place < len(values) else 0.0


@torch.no_grad()
def expressive_adapters(weights: Sequence[Tensor], target: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """A_l, B_l with ‖Π (W_l + B_l A_l) - T‖₂ = σ_{RL+1}(T - W_L ⋯ W_1), the least there is; 0 for R ≥ D/L

    B_l = S_l⁻¹ E V_l and A_l = V_lᵀ P_l⁻¹: E = T - W_L ⋯ W_1 = U S Vᵀ, V_l its R next columns, S_l the
    product of the frozen layers behind l, P_l that of the changed ones before it. The Expressive Power of
    Low-Rank Adaptation (Zeng and Lee, 2023, arXiv 2310.17513). Computed in float64.

    Args:
        weights: W_1 to W_L, each ``[D, D]``, the first one applied first.
        target: T ``[D, D]``.
        rank: R.

    Returns:
        (A_l ``[R, D]``, B_l ``[D, R]``) of each layer, in the weights' dtype, for a scale of 1.

    Raises:
        ValueError: shapes do not fit, or a product that has to be inverted is singular.

    Examples:
        >>> weights, target = [torch.randn(4, 4), torch.randn(4, 4)], torch.randn(4, 4)
        >>> pairs = expressive_adapters(weights, target, rank=2)
    """
    wide, goal = _square(weights, target, rank)
    error = goal - _product(wide)
    vectors = torch.linalg.svd(error).Vh.T
    done = unit = torch.eye(len(goal), dtype=torch.float64, device=goal.device)
    found = []
    for i, weight in enumerate(wide):
        columns = vectors[:, rank * i : rank * (i + 1)]
        lora_b, lora_a = error.new_zeros(len(goal), rank), error.new_zeros(rank, len(goal))
        used = columns.shape[1]
        if used:
            lora_b[:, :used] = _inverse(_product([unit, *wide[i + 1 :]])) @ error @ columns
            lora_a[:used] = columns.T @ _inverse(done)
        done = (weight + lora_b @ lora_a) @ done
        found.append((lora_a.to(target.dtype), lora_b.to(target.dtype)))
    return found


@torch.no_grad()
def expressive_network(
    layers: Sequence[nn.Linear], targets: Sequence[nn.Linear], rank: int, radius: float
) -> list[Piece]:
    """Changes of L frozen layers with ReLUs between them that make them L̄ target layers with ReLUs between

    for all inputs with ‖x‖ ≤ ``radius``, exactly where R ≥ D · L̄ / L (:func:`expressive_rank`) and L is a
    multiple of L̄. L/L̄ frozen layers become one target layer by :func:`expressive_adapters`; the biases keep
    what is between them positive, where a ReLU is the identity, and take it off again (Zeng and Lee, 2023,
    arXiv 2310.17513).

    Args:
        layers: the frozen linears, ``[D, D]`` each, with biases.
        targets: the target's linears, at most as many.
        rank: R.
        radius: of the ball of inputs.

    Raises:
        ValueError: L is no multiple of L̄, a layer has no bias, or as :func:`expressive_adapters`.

    Examples:
        >>> layers, targets = [nn.Linear(2, 2), nn.Linear(2, 2)], [nn.Linear(2, 2)]
        >>> pieces = expressive_network(layers, targets, rank=1, radius=1.0)
    """
    if not targets or not layers or len(layers) % len(targets):
        raise ValueError(
            f"layers: expected a multiple of the {len(targets)} targets, got {len(layers)} layers"
        )
    for i, layer in enumerate(layers):
        if layer.bias is None:
            raise ValueError(f"layers: expected one with a bias, got none in layer {i}")
    each, found = len(layers) // len(targets), []
    for i, target in enumerate(targets):
        weights = [layer.weight for layer in layers[i * each : (i + 1) * each]]
        pairs = expressive_adapters(weights, target.weight, rank)
        wanted = torch.zeros_like(target.weight[0]) if target.bias is None else target.bias
        changed = [w.double() + (b @ a).double() for w, (a, b) in zip(weights, pairs, strict=True)]
        biases, radius = _biases(changed, wanted.double(), radius)
        found += [Piece(*pair, bias.to(wanted.dtype)) for pair, bias in zip(pairs, biases, strict=True)]
    return found


def _biases(weights: list[Tensor], wanted: Tensor, radius: float) -> tuple[list[Tensor], float]:
    """Biases under which the layers are linear within the radius, and the radius behind them."""
    products = list(itertools.accumulate(weights, lambda done, weight: weight @ done))
    shift, found = torch.zeros_like(wanted), []
    for weight, product in zip(weights[:-1], products[:-1], strict=True):
        lifted = product.norm(dim=1) * radius  # at least |P x| in each place
        found.append(lifted - weight @ shift)
        shift = lifted
    found.append(wanted - weights[-1] @ shift)
    return found, float(torch.linalg.matrix_norm(products[-1], 2) * radius + wanted.norm())


def _square(weights: Sequence[Tensor], target: Tensor, rank: int) -> tuple[list[Tensor], Tensor]:
    """The weights and the target in float64, where they fit."""
    _check_count("rank", rank)
    width = target.shape[0]
    if not weights:
        raise ValueError("weights: expected at least one, got none")
    for name, one in (("target", target), *((f"weights[{i}]", w) for i, w in enumerate(weights))):
        if one.shape != (width, width):
            raise ValueError(f"{name}: expected shape {(width, width)}, got {tuple(one.shape)}")
    return [one.detach().double() for one in weights], target.detach().double()


def _product(weights: Sequence[Tensor]) -> Tensor:
    """W_n ⋯ W_1."""
    result = weights[0]
    for weight in weights[1:]:
        result = weight @ result
    return result


def _inverse(matrix: Tensor) -> Tensor:
    if torch.linalg.cond(matrix) > _CONDITION:
        raise ValueError("weights: expected products of layers that are not singular, got one that is")
    return torch.linalg.inv(matrix)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
