"""LoNAS's search: what it counts, what it measures, and the front against all sub-networks there are."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import Slice, elastic
from lora_kernels.schedules import (
    Group,
    draw_sizes,
    middle_sizes,
    multiplications,
    search_subnetworks,
    slices_of,
)

IN, WIDE = 6, 10
GROUPS = (
    Group("rank", (4, 2, 1), (("up", "rank"), ("down", "rank"))),
    Group("width", (10, 8, 5, 3), (("up", "out_features"), ("down", "in_features"))),
)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(IN, WIDE), nn.Linear(WIDE, IN)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def model():
    torch.manual_seed(0)
    net = apply_lora(MLP(), LoRAConfig(r=4, target_modules=["up", "down"], method="lonas"))
    for layer in (net.up, net.down):
        layer.adapters["default"].lora_B.data.normal_()
    return net


def score_of(net):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, IN, generator=generator)
    whole = model().eval()(x)
    return lambda: -float((net(x) - whole).norm())


def test_sizes_become_slices():
    slices = slices_of(GROUPS, {"rank": 2, "width": 5})
    assert slices == {"up": Slice(2, 5, None), "down": Slice(2, None, 5)}
    for sizes, words in (
        ({"rank": 3, "width": 5}, r"sizes: rank: expected one of \(4, 2, 1\), got 3"),
        ({"rank": 2}, "sizes: width: expected one of .*, got None"),
    ):
        with pytest.raises(ValueError, match=words):
            slices_of(GROUPS, sizes)


def test_multiplications_by_hand():
    net = model()
    assert multiplications(net) == 2 * (IN * WIDE + 4 * (IN + WIDE))
    slices = slices_of(GROUPS, {"rank": 2, "width": 5})
    assert multiplications(net, slices) == 2 * (IN * 5 + 2 * (IN + 5))


def test_the_middle_and_the_draws():
    assert middle_sizes(GROUPS) == {"rank": 2, "width": 8}
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(draw_sizes(GROUPS, generator).values()) for _ in range(300)}
    assert drawn == {(r, w) for r in (4, 2, 1) for w in (10, 8, 5, 3)}


def test_every_sub_network_where_they_are_few():
    net = model()
    net.train()
    calls, score = [], score_of(net)

    def evaluate():
        assert not net.training and not torch.is_grad_enabled()
        calls.append(score())
        return calls[-1]

    front = search_subnetworks(net, GROUPS, evaluate, evaluations=12)
    assert len(calls) == 12 and net.training
    found = []
    net.eval()
    for rank in (4, 2, 1):
        for width in (10, 8, 5, 3):
            slices = slices_of(GROUPS, {"rank": rank, "width": width})
            with elastic(net, slices):
                found.append((score(), multiplications(net, slices)))
    best = {one for one in found if not any(o != one and o[0] >= one[0] and o[1] <= one[1] for o in found)}
    assert {(one.score, one.macs) for one in front} == best
    assert [one.macs for one in front] == sorted({one.macs for one in front})
    assert front[-1].sizes == {"rank": 4, "width": 10} and front[-1].score == 0


def test_nsga_2_measures_no_more_than_it_may():
    pytest.importorskip("pymoo")
    net = model()
    calls, score = [], score_of(net)
    front = search_subnetworks(
        net, GROUPS, lambda: calls.append(1) or score(), evaluations=10, population=5, seed=1
    )
    assert len(calls) <= 10
    assert front[-1].sizes == {"rank": 4, "width": 10}  # the largest is in the first population
    again = search_subnetworks(net, GROUPS, score, evaluations=10, population=5, seed=1)
    assert again == front


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    net = model()
    with pytest.raises(ImportError, match=r"expected pymoo \(pip install lora-kernels\[search\]\)"):
        search_subnetworks(net, GROUPS, lambda: 0.0, evaluations=3)


BAD = {
    "none": ((), "groups: expected some, each of its own name"),
    "twice": ((GROUPS[0], GROUPS[0]), "groups: expected some, each of its own name"),
    "no choices": ((Group("a", (), (("up", "rank"),)),), "groups: a: expected choices and parts"),
    "field": ((Group("a", (1,), (("up", "depth"),)),), "groups: a: expected one of .*, got 'depth'"),
    "layer": ((Group("a", (1,), (("left", "rank"),)),), "expected layers that are a LoRALinear, got 'left'"),
    "size": ((Group("a", (9,), (("up", "rank"),)),), "up: expected rank of 1 to 4, got 9"),
    "zero": ((Group("a", (0, 2), (("up", "rank"),)),), "groups: a: expected at least 1, got 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_groups(what):
    groups, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        search_subnetworks(model(), groups, lambda: 0.0)
    with pytest.raises(ValueError, match="evaluations: expected at least 1, got 0"):
        search_subnetworks(model(), GROUPS, lambda: 0.0, evaluations=0)
