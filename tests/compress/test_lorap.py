"""LoRAP: the weighted decomposition is the best there is, and blocks see what those before have become."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, calibrate
from lora_kernels.compress import awsvd, factorise, lorap, lorap_ranks, neuron_scores, prune_mlp, truncate_svd
from lora_kernels.nn import LowRankLinear, remove_lora

WIDE, WIDTH, NEURONS = torch.float64, 8, 20


def weighted(error, squares):
    return (error * squares.sqrt()).norm()


def problem(out=10, cols=12):
    torch.manual_seed(0)
    return torch.randn(out, cols, dtype=WIDE), torch.logspace(-2, 2, cols, dtype=WIDE)


@pytest.mark.parametrize("rank", [1, 4, 9, 10])
def test_nothing_of_the_rank_is_nearer_by_the_weights(rank):
    weight, squares = problem()
    a, b = awsvd(weight, squares, rank)
    assert a.shape == (rank, 12) and b.shape == (10, rank)
    best = weighted(weight - b @ a, squares)
    values = torch.linalg.svdvals(weight * squares.sqrt())
    torch.testing.assert_close(best, values[rank:].norm())
    plain_a, plain_b = truncate_svd(weight, rank)
    assert best <= weighted(weight - plain_b @ plain_a, squares) + 1e-9
    for _ in range(10):
        da, db = 1e-3 * torch.randn_like(a), 1e-3 * torch.randn_like(b)
        assert weighted(weight - (b + db) @ (a + da), squares) >= best - 1e-12


def test_equal_weights_are_the_plain_decomposition_and_zeros_count():
    weight, squares = problem()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    a, b = truncate_svd(weight, 3)
    torch.testing.assert_close(b @ a, (u[:, :3] * s[:3]) @ vh[:3])
    other_a, other_b = awsvd(weight, torch.full_like(squares, 5.0), 3)
    torch.testing.assert_close(other_b @ other_a, b @ a)
    squares[3] = 0
    assert all(one.isfinite().all() for one in awsvd(weight, squares, 3))


def test_a_linear_of_two_factors():
    torch.manual_seed(0)
    a, b, bias = (torch.randn(*s, dtype=WIDE) for s in ((3, 12), (10, 3), (10,)))
    layer, x = LowRankLinear(a, b, bias), torch.randn(2, 5, 12, dtype=WIDE, requires_grad=True)
    y, want = layer(x), F.linear(x, layer.up @ layer.down, layer.bias)
    torch.testing.assert_close(y, want)
    leaves, dy = [x, *layer.parameters()], torch.randn_like(y)
    for one, other in zip(*(torch.autograd.grad(out, leaves, dy) for out in (y, want)), strict=True):
        torch.testing.assert_close(one, other)
    more_a, more_b = torch.randn(2, 12, dtype=WIDE), torch.randn(10, 2, dtype=WIDE)
    wider = layer.extended(more_a, more_b, 0.5)
    assert wider.rank == 5 and sum(p.numel() for p in wider.parameters()) == 5 * (12 + 10) + 10
    torch.testing.assert_close(wider(x), y + 0.5 * x @ more_a.T @ more_b.T)
    for bad, words in (((a, b.T), "expected shapes"), ((a, b, bias[:3]), r"bias: expected shape \(10,\)")):
        with pytest.raises(ValueError, match=words):
            LowRankLinear(*bad)


def test_ranks():
    assert lorap_ranks(0.2, 4096) == (1228, None)
    assert lorap_ranks(0.5, 4096) == (512, 1536)
    low, high = lorap_ranks(0.5, 4096, 1024)
    assert (low, high) == (204, 613) and 2 * (low + high) * (4096 + 1024) <= 0.5 * 4 * 4096 * 1024
    assert lorap_ranks(0.99, 4) == (1, 1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.o_proj((self.q_proj(x) @ self.k_proj(x).mT).softmax(-1) @ self.v_proj(x))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, NEURONS), nn.Linear(WIDTH, NEURONS)
        self.down_proj = nn.Linear(NEURONS, WIDTH)

    def forward(self, x, mask=None):
        h = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h if mask is None else h * mask)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


def model():
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 3)).to(WIDE)


def batches():
    generator = torch.Generator().manual_seed(2)
    scale = torch.logspace(-1, 1, WIDTH, dtype=WIDE)
    return [scale * torch.randn(2, 6, WIDTH, generator=generator, dtype=WIDE) for _ in range(3)]


def sums(net, name):
    """What a linear reads, by a hook of our own."""
    total = 0.0

    def hook(module, args, output):
        nonlocal total
        total = total + args[0].square().sum((0, 1))

    handle = net.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for x in batches():
            net(x)
    handle.remove()
    return total / 6


def test_the_statistic_is_a_mean_over_samples():
    found = calibrate(model(), batches(), "squares")
    for name in ("0.attention.o_proj", "1.mlp.down_proj"):
        torch.testing.assert_close(found[name]["squares"], sums(model(), name))


def masked_statistic():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 2)

        def forward(self, x, attention_mask):
            return self.one(x)

    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = calibrate(Masked(), [{"x": x, "attention_mask": mask}], "squares")
    return found["one"]["squares"], (x * mask[..., None]).square().sum((0, 1)) / 2


def test_padding_does_not_count():
    torch.testing.assert_close(*masked_statistic())


def test_each_block_sees_what_those_before_have_become():
    net, want = model(), model()
    kept = lorap(net, batches(), 0.5, keep_low=0.1)
    for block in ("0", "1"):
        names = [f"{block}.attention.{one}_proj" for one in "qkvo"]
        mlp = want.get_submodule(f"{block}.mlp")
        up, down = f"{block}.mlp.up_proj", f"{block}.mlp.down_proj"
        squares = {name: sums(want, name) for name in (*names, up, down)}
        low, high = lorap_ranks(0.5, WIDTH)
        for name in names:
            linear, rank = want.get_submodule(name), low if name[-6] in "qk" else high
            scale = squares[name].sqrt()
            u, s, vh = torch.linalg.svd(linear.weight.detach() * scale)
            linear.weight.data = (u[:, :rank] * s[:rank]) @ vh[:rank] / scale
            assert kept.ranks[name] == rank
        scores = (mlp.down_proj.weight * squares[down].sqrt()).norm(dim=0)
        for one in (mlp.gate_proj, mlp.up_proj):
            scores = scores + (one.weight * squares[up].sqrt()).norm(dim=1)
        gone = scores.argsort()[2:12]
        with torch.no_grad():
            mlp.down_proj.weight[:, gone] = 0
        assert kept.neurons[down] == 10
    x = batches()[0]
    torch.testing.assert_close(net(x), want(x))
    assert isinstance(net[0].attention.q_proj, LowRankLinear) and net[0].mlp.up_proj.out_features == 10
    assert set(kept.ranks) == {f"{b}.attention.{one}_proj" for b in (0, 1) for one in "qkvo"}


def test_a_pruned_mlp_is_the_masked_one():
    torch.manual_seed(0)
    mlp, x = MLP().to(WIDE), torch.randn(4, WIDTH, dtype=WIDE)
    whole = copy.deepcopy(mlp)
    squares = torch.rand(WIDTH, dtype=WIDE), torch.rand(NEURONS, dtype=WIDE)
    ups = [mlp.gate_proj, mlp.up_proj]
    scores = neuron_scores(ups, mlp.down_proj, *squares)
    assert prune_mlp(ups, mlp.down_proj, scores, 0.3, 0.05) == 14
    mask = torch.ones(NEURONS, dtype=WIDE)
    mask[scores.argsort()[1:7]] = 0
    torch.testing.assert_close(mlp(x), whole(x, mask))


def test_values_stay_dense_at_little_sparsity():
    net = model()
    weight = net[0].attention.v_proj.weight.clone()
    kept = lorap(net, batches(), 0.2)
    assert set(kept.ranks) == {f"{b}.attention.{one}_proj" for b in (0, 1) for one in "qk"}
    assert torch.equal(net[0].attention.v_proj.weight, weight)


def test_recovery_loses_nothing():
    net = model()
    kept = lorap(net, batches(), 0.6, dense=True)
    names = list(kept.ranks)
    assert all(type(net.get_submodule(name)) is nn.Linear for name in names)
    apply_lora(net, LoRAConfig(r=1, lora_alpha=2, target_modules=names, init_lora_weights=False))
    remove_lora(net, merge=True)
    x = batches()[0]
    y = net(x)
    factorise(net, {name: rank + 1 for name, rank in kept.ranks.items()})
    torch.testing.assert_close(net(x), y)
    assert net[0].attention.q_proj.rank == kept.ranks["0.attention.q_proj"] + 1


BAD = {
    "sparsity": ({"sparsity": 1.0}, "sparsity: expected 0 < sparsity < 1, got 1.0"),
    "ratio": ({"ratio": 0}, "ratio: expected 0 < ratio, got 0"),
    "keep_low": (
        {"keep_low": 0.7, "sparsity": 0.5},
        r"keep_low: expected at most 1 - sparsity = 0.5",
    ),
    "batches": ({"batches": []}, "batches: expected at least one, got none"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_changes_nothing(what):
    options, words = BAD[what]
    net = model()
    with pytest.raises(ValueError, match=words):
        lorap(net, **{"batches": batches(), **options})
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), model().parameters(), strict=True))


def test_what_is_no_such_model():
    with pytest.raises(
        ValueError, match=r"roles: expected the names of some linears of the model, got .*q_proj"
    ):
        lorap(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)])
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        lorap(3, [])
    net = model()
    net[1].attention.spare = nn.ModuleDict({"q_proj": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"batches: .* 1.attention.spare.q_proj never ran"):
        lorap(net, batches())
    assert type(net[0].attention.q_proj) is nn.Linear
    net = model()
    del net[1].mlp.gate_proj
    with pytest.raises(ValueError, match=r"model: 1.mlp.gate_proj: expected an nn.Linear, got nothing"):
        lorap(net, batches())
    with pytest.raises(ValueError, match=r"model: 2: expected an nn.Linear, got nothing"):
        factorise(nn.Sequential(nn.Linear(2, 2)), {"0": 1, "2": 1})
    with pytest.raises(ValueError, match=r"rank: expected at most the sides of W \(2, 2\), got 3"):
        truncate_svd(torch.ones(2, 2), 3)
    with pytest.raises(ValueError, match=r"squares: expected 2 numbers of at least 0, got shape \(3,\)"):
        awsvd(torch.ones(2, 2), torch.ones(3), 1)
    with pytest.raises(ValueError, match=r"scores: expected one for each of 20 neurons, got shape \(3,\)"):
        prune_mlp([], MLP().down_proj, torch.ones(3), 0.5)
