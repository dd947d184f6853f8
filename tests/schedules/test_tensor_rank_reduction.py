"""Rank reduction: its decompositions against an oracle, its dual objective, and what it exports."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lora_kernels.compress import adaptive_rank, truncate_svd, tucker2, tucker2_conv, tucker2_weight
from lora_kernels.compress.decompose import Truncations
from lora_kernels.nn import LowRankLinear
from lora_kernels.schedules import RankReducer

WIDE = torch.float64


def kernel(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=WIDE)


def test_a_full_rank_is_exact_and_the_rest_is_what_was_dropped():
    weight = kernel(9, 7)
    for rank in range(1, 8):
        a, b = truncate_svd(weight, rank)
        want = torch.linalg.svdvals(weight)[rank:].square().sum()
        torch.testing.assert_close((weight - b @ a).square().sum(), want)
    for shape in ((6, 5, 3, 3), (6, 5, 3), (6, 5)):
        whole = kernel(*shape)
        torch.testing.assert_close(tucker2_weight(*tucker2(whole, shape[:2])), whole)


@pytest.mark.parametrize("ranks", [(3, 2), (1, 1), (6, 2)])
def test_tucker_2_is_no_worse_than_that_of_the_unfoldings(ranks):
    weight = kernel(6, 5, 3, 3)
    core, outer, inner = tucker2(weight, ranks)
    assert core.shape == (*ranks, 3, 3) and outer.shape == (6, ranks[0]) and inner.shape == (5, ranks[1])
    for factor in (outer, inner):
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1], dtype=WIDE))
    error = (weight - tucker2_weight(core, outer, inner)).norm()
    u = torch.linalg.svd(weight.flatten(1)).U[:, : ranks[0]]
    v = torch.linalg.svd(weight.movedim(1, 0).flatten(1)).U[:, : ranks[1]]
    plain = torch.einsum("oikl,op,iq,ap,bq->abkl", weight, u, v, u, v)
    assert error <= (weight - plain).norm() + 1e-9


def test_tucker_2_against_tensorly():
    tensorly = pytest.importorskip("tensorly")
    tensorly.set_backend("pytorch")
    from tensorly.decomposition import partial_tucker

    weight = kernel(6, 5, 3, 3)
    (core, factors), _ = partial_tucker(weight, rank=[3, 2], modes=[0, 1], n_iter_max=100, tol=1e-12)
    want = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    got = tucker2_weight(*tucker2(weight, (3, 2), 100))
    assert (weight - got).norm() <= (weight - want).norm() * (1 + 1e-6)


SHAPES = {nn.Conv1d: (2, 5, 11), nn.Conv2d: (2, 5, 9, 8), nn.Conv3d: (1, 5, 5, 6, 5)}
OPTIONS = (
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"padding": 1, "padding_mode": "circular"},
    {"dilation": 2},
)


@pytest.mark.parametrize("kind, shape", SHAPES.items())
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_three_convolutions_are_the_one_of_their_product(kind, shape, options):
    torch.manual_seed(0)
    conv = kind(5, 6, 3, dtype=WIDE, **options)
    parts = tucker2(conv.weight, (4, 3))
    x = torch.randn(*shape, dtype=WIDE)
    three = tucker2_conv(conv, *parts)(x)
    with torch.no_grad():
        conv.weight.copy_(tucker2_weight(*parts))
    torch.testing.assert_close(three, conv(x))


def test_the_rank_that_loses_little():
    values = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=WIDE)
    q, _ = torch.linalg.qr(kernel(4, 4))
    weight = q * values @ torch.linalg.qr(kernel(4, 4) + 1)[0]
    energy = values.square().sum().item()
    for eps, want in ((0.0, 4), (0.26 / energy, 3), (1.26 / energy, 2), (0.9, 1), (5.0, 1)):
        assert adaptive_rank(weight, eps) == want
    with pytest.raises(ValueError, match="weight: expected a matrix"):
        adaptive_rank(kernel(2, 2, 2), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_all_ranks_of_one_decomposition(shape, dtype):
    """As near to the nearest of each rank as a decomposition in that dtype is, up to twice its error."""
    weight = kernel(*shape).to(dtype)
    parts, u, s, vh = Truncations(weight), *torch.linalg.svd(weight.to(WIDE), full_matrices=False)
    for rank in (1, 7, 23):
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        a, b = truncate_svd(weight, rank)
        eager = ((b @ a).to(WIDE) - best).norm()
        assert (parts.at([rank]).to(WIDE) - best).norm() <= 2 * eager + 1e-13 * s[0]
        assert parts.error([rank]) == pytest.approx(s[rank:].square().sum().item(), rel=1e-6)
    assert torch.equal(parts.at([24]), weight) and parts.at([24]) is not weight


def test_an_epoch_decomposes_each_weight_once(monkeypatch):
    calls, real = [], torch.linalg.svd
    net = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 12)).to(WIDE)
    reducer = RankReducer(net, every=1, eps=0.5)
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or real(*a, **k))
    reducer.step()
    assert len(calls) == 2 and all(ranks[0] < 8 for ranks in reducer.ranks.values())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.linear = nn.Conv2d(3, 6, 3), nn.Linear(24, 10)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))


def x():
    return torch.randn(5, 3, 4, 4, dtype=WIDE, generator=torch.Generator().manual_seed(0))


def test_the_gradient_of_the_penalty_is_lambda_times_the_gap():
    net = Net().to(WIDE)
    reducer = RankReducer(net, every=1, lam=0.5, eps=0.3)
    assert reducer.penalty().item() == pytest.approx(0)
    reducer.step()
    assert reducer.ranks["linear"][0] < 10 or reducer.ranks["conv"] != [6, 3]
    gaps = {n: net.get_submodule(n).weight - target for n, target in reducer.targets.items()}
    want = 0.25 * sum(gap.square().sum() for gap in gaps.values())
    torch.testing.assert_close(reducer.penalty(), want)
    reducer.penalty().backward()
    for name in ("conv", "linear"):
        weight = net.get_submodule(name).weight
        torch.testing.assert_close(weight.grad, 0.5 * (weight.detach() - reducer.targets[name]))
    assert net.conv.bias.grad is None
    grads = [p.grad for p in net.parameters()]
    net.zero_grad()
    for times in (1, 2):  # where there is no gradient yet, and where there is
        reducer.pull()
        for p, grad in zip(net.parameters(), grads, strict=True):
            assert (p.grad is None) == (grad is None)
            if grad is not None:
                torch.testing.assert_close(p.grad, times * grad)


def test_ranks_fall_within_the_error_and_never_rise():
    net = Net().to(WIDE)
    reducer = RankReducer(net, every=2, eps=0.2)
    seen = []
    for _ in range(8):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1).add_(0.02 * torch.randn_like(p))
        reducer.step()
        seen.append({name: list(ranks) for name, ranks in reducer.ranks.items()})
    assert seen[0] == {"conv": [6, 3], "linear": [10]} and seen[1] != seen[0] and seen[2] == seen[1]
    for before, after in itertools.pairwise(seen):
        assert all(a <= b for name in before for a, b in zip(after[name], before[name], strict=True))
    for name, layer in reducer.layers.items():
        gap = (layer.weight - reducer.targets[name]).square().sum()
        assert gap <= 0.2 * layer.weight.square().sum() + 1e-9


def test_what_is_exported_is_the_decomposed_model():
    net = Net().to(WIDE)
    reducer = RankReducer(net, every=1, eps=0.6)
    reducer.step()
    want, size = Net().to(WIDE), sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        for name, target in reducer.targets.items():
            want.get_submodule(name).weight.copy_(target)
    small = reducer.export()
    torch.testing.assert_close(small(x()), want(x()))
    assert isinstance(small.linear, LowRankLinear) and isinstance(small.conv, nn.Sequential)
    assert sum(p.numel() for p in small.parameters()) < size


def test_what_saves_nothing_stays():
    net = Net().to(WIDE)
    assert type(RankReducer(net, every=1).export().linear) is nn.Linear


def test_ranks_by_a_score():
    net = Net().to(WIDE)
    whole = net(x()).detach()
    reducer = RankReducer(
        net, every=1, evaluate=lambda: -float((net(x()) - whole).norm()), tolerance=0.3 * float(whole.norm())
    )
    before = [p.clone() for p in net.parameters()]
    for _ in range(12):
        reducer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert reducer.ranks["linear"][0] < 10 or reducer.ranks["conv"] != [6, 3]
    reducer.export()
    assert (net(x()) - whole).norm() <= 0.3 * whole.norm() + 1e-6


BAD = {
    "every": ({"every": 0}, "every: expected at least 1, got 0"),
    "rate": ({"rate": 1.0}, "rate: expected 0 < rate < 1, got 1.0"),
    "eps": ({"eps": -1}, "eps: expected 0 <= eps, got -1"),
    "exclude": ({"exclude": ("head",)}, "exclude: expected layers that can be decomposed, got 'head'"),
    "all": (
        {"exclude": ("conv", "linear")},
        "model: expected linears or convolutions to decompose, got none",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    options, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        RankReducer(Net(), **{"every": 1, **options})


def test_bad_ranks():
    with pytest.raises(
        ValueError, match=r"ranks: expected 1 to the first sizes of W \(6, 5, 3\), got \(7, 1\)"
    ):
        tucker2(kernel(6, 5, 3), (7, 1))
    with pytest.raises(ValueError, match="conv: expected one without groups, got 2 groups"):
        tucker2_conv(nn.Conv1d(2, 2, 1, groups=2), *tucker2(kernel(2, 2, 1), (1, 1)))
