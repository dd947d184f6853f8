"""AdvLoRA: its trained scale, its clusters, and the loss under attack."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import IN, OUT, RANK, new_layer, shake
from oracles import agrees, trained

from lora_kernels import load_adapter, save_adapter
from lora_kernels.init.clusters import cluster_rows
from lora_kernels.nn import (
    LoRAConfig,
    LoRALinear,
    apply_lora,
    disable_adapters,
    mixed_adapters,
    remove_lora,
)
from lora_kernels.schedules import advlora_loss

WIDE = torch.float64


def branch(adapter, x):
    return adapter.scale * 6 / RANK * x @ adapter.lora_A.T @ adapter.lora_B.T


def test_values_and_gradients_with_a_trained_scale():
    layer = shake(new_layer("advlora"))
    agrees(layer, branch)
    assert trained(layer) == RANK * (IN + OUT) + 1


def test_the_scale_s_gradient_by_finite_differences():
    layer = shake(new_layer("advlora"))
    x, dy = torch.randn(5, IN, dtype=WIDE), torch.randn(5, OUT, dtype=WIDE)
    scale = layer.adapters["default"].scale
    layer(x).backward(dy)
    sides = []
    for move in (1e-6, -2e-6):
        with torch.no_grad():
            scale.add_(move)
            sides.append((layer(x) * dy).sum())
    torch.testing.assert_close(scale.grad[0], (sides[0] - sides[1]) / 2e-6, rtol=1e-6, atol=1e-6)


def error(rows, centres, places):
    return (rows - centres[places]).square().sum()


def test_the_clusters_of_each_round_are_no_worse():
    torch.manual_seed(0)
    rows = torch.randn(40, 6, dtype=WIDE)
    errors = [error(rows, *cluster_rows(rows, 5, rounds)) for rounds in range(12)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.exhaustive  # its import takes longer than all the rest
def test_clusters_against_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(0)
    rows = torch.randn(4, 6, dtype=WIDE).repeat_interleave(10, 0) + 0.01 * torch.randn(40, 6, dtype=WIDE)
    centres, places = cluster_rows(rows, 4, 50)
    want = cluster.KMeans(4, init=centres.numpy(), n_init=1).fit(rows.numpy())
    torch.testing.assert_close(centres, torch.from_numpy(want.cluster_centers_))
    torch.testing.assert_close(error(rows, centres, places).item(), want.inertia_)


@pytest.mark.parametrize("align", [False, True])
def test_the_start_is_w_and_its_clusters(align, tmp_path):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(IN, OUT, dtype=WIDE))
    weight, x = base[0].weight.detach().clone(), torch.randn(4, IN, dtype=WIDE)
    y = base(x).detach()
    options = {"init_lora_weights": "clusters", "method_options": {"align": align}}
    config = LoRAConfig(RANK, 6, ["0"], method="advlora", **options)
    model = apply_lora(base, config)
    adapter = model[0].adapters["default"]
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    centres, places = cluster_rows(weight, RANK)
    torch.testing.assert_close(adapter.delta().detach(), centres[places])
    member = torch.nn.functional.one_hot(places, RANK).to(WIDE)
    assert torch.equal(adapter.lora_B.detach(), member) != align
    with torch.no_grad():
        adapter.scale.fill_(0.7)
    save_adapter(model, tmp_path)
    other = torch.nn.Sequential(torch.nn.Linear(IN, OUT, dtype=WIDE))
    with torch.no_grad():
        other[0].weight.copy_(weight)
        other[0].bias.copy_(model[0].bias)
    torch.testing.assert_close(load_adapter(other, tmp_path)(x), model(x))
    torch.testing.assert_close(remove_lora(model)(x), y, rtol=1e-12, atol=1e-12)


def test_alignment_brings_a_nearest_to_pissa_s():
    near = []
    for align in (False, True):
        torch.manual_seed(0)
        options = {"init_lora_weights": "clusters", "method_options": {"align": align}}
        layer = LoRALinear(IN, OUT, r=RANK, dtype=WIDE, method="advlora", **options)
        _, s, vh = torch.linalg.svd(layer.bare_weight)
        scaling = layer.adapters["default"].scaling
        want = (s[:RANK] / scaling).sqrt()[:, None] * vh[:RANK]
        near.append((layer.adapters["default"].lora_A - want).norm())
    assert near[1] < near[0]


def test_more_clusters_than_distinct_rows():
    centres, places = cluster_rows(torch.ones(5, 3), 4)
    assert centres.shape == (4, 3) and torch.equal(centres[places], torch.ones(5, 3))


def problem():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    x, labels = torch.rand(8, 6), torch.arange(8) % 3
    return model, x, lambda z: F.cross_entropy(model(z), labels)


def test_the_loss_is_of_samples_within_the_ball_that_hurt():
    model, x, loss = problem()
    seen = []

    def watched(z):
        seen.append(z.detach())
        return loss(z)

    mixed = advlora_loss(watched, x, clean=0.25, radius=0.1, step=0.04, steps=4)
    attacked = seen[-2]
    assert (attacked - x).abs().max() <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert torch.equal(seen[-1], x) and loss(attacked) > loss(x)
    torch.testing.assert_close(mixed, 0.25 * loss(x) + 0.75 * loss(attacked))
    assert all(p.grad is None for p in model.parameters())
    mixed.backward()
    assert model.weight.grad.any()


def test_without_bounds_and_clean_samples():
    _, x, loss = problem()
    hard = advlora_loss(loss, x, clean=0.0, radius=0.5, step=0.2, bounds=None, start=0.0)
    assert hard > loss(x)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"clean": 1.5}, "clean: expected at most 1, got 1.5"),
        ({"clean": -1}, "clean: expected 0 <= clean, got -1"),
        ({"radius": -0.1}, "radius: expected 0 <= radius, got -0.1"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
    ],
)
def test_bad_numbers(options, words):
    _, x, loss = problem()
    with pytest.raises(ValueError, match=words):
        advlora_loss(loss, x, **options)
    with pytest.raises(TypeError, match=r"x: expected a floating dtype, got torch.int64"):
        advlora_loss(loss, torch.ones(2, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    "r,options,words",
    [
        (OUT + 1, {}, f"r: 'clusters' expects at most {OUT}, got {OUT + 1}"),
        (2, {"rounds": -1}, "rounds: expected at least 0, got -1"),
        (2, {"align": "no"}, "align: expected one of"),
    ],
)
def test_bad_starts(r, options, words):
    with pytest.raises(ValueError, match=words):
        LoRALinear(IN, OUT, r=r, method="advlora", init_lora_weights="clusters", method_options=options)


class Siblings(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(6, 5, dtype=WIDE), torch.nn.Linear(6, 5, dtype=WIDE)

    def forward(self, x):
        return self.one(x) * self.two(x)


KINDS = {
    "conv": lambda: (
        torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2, dtype=WIDE)),
        torch.randn(2, 3, 5, dtype=WIDE),
        ["0"],
    ),
    "group": lambda: (Siblings(), torch.randn(4, 6, dtype=WIDE), ["one", "two"]),
    "mixed": lambda: (Siblings(), torch.randn(4, 6, dtype=WIDE), ["one", "two"]),
}


@pytest.mark.parametrize("kind", ["conv", "group", "mixed"])
def test_the_scale_reaches_every_kind_of_call(kind):
    """Where A, B and s are taken apart, s may be a tensor that trains."""
    torch.manual_seed(0)
    net, x, names = KINDS[kind]()
    model = shake(apply_lora(net, LoRAConfig(2, 6, names, method="advlora")))
    layers = [layer for layer in model.modules() if hasattr(layer, "adapters")]
    scales = [layer.adapters["default"].scale for layer in layers]
    with mixed_adapters(model, ["default"] * len(x)) if kind == "mixed" else contextlib.nullcontext():
        y = model(x)
    got = torch.autograd.grad(y.square().sum(), scales)
    for layer in layers:
        layer.weight.data = layer.merged_weight()
    with disable_adapters(model):
        torch.testing.assert_close(model(x), y)
    assert all(one.abs() > 0 for one in got)
