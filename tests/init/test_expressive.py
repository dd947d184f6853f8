"""The construction reaches the bound that no updates of its ranks can beat."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.init import expressive_adapters, expressive_bound, expressive_network, expressive_rank

WIDE, WIDTH, DEPTH = torch.float64, 12, 3


def weights(count=DEPTH, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(width, width, generator=generator, dtype=WIDE) for _ in range(count)]


def product(layers):
    result = torch.eye(WIDTH, dtype=WIDE)
    for layer in layers:
        result = layer @ result
    return result


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 20])
def test_the_error_is_the_singular_value(rank):
    frozen, (target,) = weights(), weights(1, 7)
    pairs = expressive_adapters(frozen, target, rank)
    changed = [w + b @ a for w, (a, b) in zip(frozen, pairs, strict=True)]
    error = torch.linalg.matrix_norm(product(changed) - target, 2)
    values = [*torch.linalg.svdvals(target - product(frozen)).tolist(), *[0.0] * WIDTH * 5]
    assert error.item() == pytest.approx(values[rank * DEPTH], rel=1e-8, abs=1e-8)
    assert expressive_bound(frozen, target, rank) == pytest.approx(values[rank * DEPTH])
    for a, b in pairs:
        assert a.shape == (rank, WIDTH) and b.shape == (WIDTH, rank)
        assert torch.linalg.matrix_rank(b @ a) <= rank


def test_other_updates_of_the_rank_are_above_the_bound():
    frozen, (target,) = weights(), weights(1, 7)
    bound = expressive_bound(frozen, target, 2)
    for seed in range(20):
        factors = weights(2 * DEPTH, 100 + seed)
        changed = [w + 0.1 * factors[2 * i][:, :2] @ factors[2 * i + 1][:2] for i, w in enumerate(frozen)]
        assert torch.linalg.matrix_norm(product(changed) - target, 2) >= bound


def network(depth, seed, width=WIDTH):
    torch.manual_seed(seed)
    parts = []
    for _ in range(depth):
        parts += [nn.Linear(width, width, dtype=WIDE), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def linears(model):
    return [one for one in model if isinstance(one, nn.Linear)]


@pytest.mark.parametrize("target_depth", [1, 2])
def test_a_network_of_relus_becomes_another(target_depth):
    depth = 4
    frozen, target = network(depth, 0), network(target_depth, 1)
    rank = expressive_rank(WIDTH, depth, target_depth)
    assert rank == {1: 3, 2: 6}[target_depth]
    x = (
        nn.functional.normalize(torch.randn(200, WIDTH, dtype=WIDE), dim=1)
        * torch.rand(200, 1, dtype=WIDE)
        * 5
    )
    pieces = expressive_network(linears(frozen), linears(target), rank, radius=5.0)
    names = [name for name, one in frozen.named_modules() if isinstance(one, nn.Linear)]
    statistics = {name: {"expressive": one.change} for name, one in zip(names, pieces, strict=True)}
    config = LoRAConfig(r=rank, lora_alpha=3, target_modules=names, init_lora_weights="expressive")
    before = [one.weight.clone() for one in linears(frozen)]
    with torch.no_grad():
        for layer, piece in zip(linears(frozen), pieces, strict=True):
            layer.bias.copy_(piece.bias)
    apply_lora(frozen, config, statistics=statistics)
    torch.testing.assert_close(frozen(x), target(x), rtol=1e-8, atol=1e-8)
    for layer, weight in zip((frozen[int(name)] for name in names), before, strict=True):
        assert torch.equal(layer.weight, weight)  # nothing is taken out of W


def test_missing_ranks_show_as_far_as_the_bound_says():
    frozen, target = network(4, 0), network(1, 1)
    bound = expressive_bound([one.weight for one in linears(frozen)], target[0].weight, 2)
    x = torch.randn(50, WIDTH, dtype=WIDE)
    pieces = expressive_network(linears(frozen), linears(target), 2, radius=float(x.norm(dim=1).max()))
    with torch.no_grad():
        for layer, piece in zip(linears(frozen), pieces, strict=True):
            layer.weight += piece.change
            layer.bias.copy_(piece.bias)
    error = (frozen(x) - target(x)).norm(dim=1)
    assert error.max() > 1e-3 and (error <= bound * x.norm(dim=1) + 1e-8).all()


def test_it_says_where_the_statistic_comes_from():
    config = LoRAConfig(r=2, target_modules=["0"], init_lora_weights="expressive")
    with pytest.raises(ValueError, match=r"needs the statistic 'expressive' of 0; make it by .*network"):
        apply_lora(network(1, 0), config)
    with pytest.raises(ValueError, match=r"expected expressive of shape \[12, 12\], got \(3, 3\)"):
        apply_lora(network(1, 0), config, statistics={"0": {"expressive": torch.zeros(3, 3)}})


def test_bad_input():
    frozen, (target,) = weights(), weights(1, 7)
    with pytest.raises(ValueError, match=r"weights\[1\]: expected shape \(12, 12\), got \(12, 11\)"):
        expressive_adapters([frozen[0], frozen[1][:, :11]], target, 2)
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        expressive_adapters(frozen, target, 0)
    with pytest.raises(TypeError, match="rank: expected an int, got float"):
        expressive_bound(frozen, target, 2.0)
    with pytest.raises(ValueError, match="weights: expected at least one, got none"):
        expressive_adapters([], target, 2)
    flat = frozen[2].clone()
    flat[0] = 0
    with pytest.raises(ValueError, match="weights: expected products of layers that are not singular"):
        expressive_adapters([frozen[0], flat, flat], target, 2)
    with pytest.raises(ValueError, match="layers: expected a multiple of the 2 targets, got 3 layers"):
        expressive_network(linears(network(3, 0)), linears(network(2, 0)), 2, 1.0)
    with pytest.raises(ValueError, match="layers: expected one with a bias, got none in layer 0"):
        expressive_network([nn.Linear(2, 2, bias=False)], [nn.Linear(2, 2)], 2, 1.0)
