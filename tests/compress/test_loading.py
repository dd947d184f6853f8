"""A compressed model comes back from its state dict, or the plain one is left as it was."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from lora_kernels.compress import Roles, factorise, load_compressed, lorap
from lora_kernels.nn import LowRankLinear
from lora_kernels.schedules import RankReducer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.q_proj, self.up, self.down = nn.Linear(24, 24, bias=False), nn.Linear(24, 20), nn.Linear(20, 4)

    def forward(self, x):
        x = self.q_proj(torch.relu(self.conv(x)).flatten(1))
        return self.down(torch.relu(self.up(x)))


def net(seed):
    torch.manual_seed(seed)
    return Net().eval()


def x():
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def by_lorap(model):
    lorap(model, [x()], 0.5, roles=Roles(("q_proj",), (), ("up",), "down"))


def by_reducer(model):
    reducer = RankReducer(model, every=1, eps=0.5)
    reducer.step()
    reducer.export()


WAYS = {
    "lorap": by_lorap,
    "reducer": by_reducer,
    "factors": lambda model: factorise(model, {"up": 3}),
    "none": id,
}


@pytest.mark.parametrize("way", WAYS)
def test_it_comes_back(way):
    model = net(0)
    WAYS[way](model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = load_compressed(net(1), torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x()), model(x()), rtol=0, atol=0)
    assert {name: type(one) for name, one in other.named_modules()} == {
        name: type(one) for name, one in model.named_modules()
    }
    if way == "reducer":
        assert isinstance(other.q_proj, LowRankLinear) and isinstance(other.conv, nn.Sequential)


def test_a_layer_by_itself_and_in_another_dtype():
    holder = nn.ModuleDict({"one": nn.Linear(6, 5)}).double()
    small = factorise(nn.ModuleDict({"one": nn.Linear(6, 5)}), {"one": 2})
    load_compressed(holder, small.state_dict())
    assert holder["one"].down.dtype == torch.float64


@pytest.mark.parametrize("what", ["missing", "more", "shape"])
def test_a_state_of_something_else_changes_nothing(what):
    model, plain = net(0), net(1)
    by_reducer(model)
    state = model.state_dict()
    if what == "missing":
        del state["up.bias" if "up.bias" in state else "down.bias"]
    elif what == "more":
        state["other.weight"] = torch.ones(2)
    else:
        state["down.bias"] = torch.ones(7)
    before = {name: (type(one), id(one)) for name, one in plain.named_modules()}
    with pytest.raises(ValueError, match=r"state: .*: expected shape .* of the model, got"):
        load_compressed(plain, state)
    assert {name: (type(one), id(one)) for name, one in plain.named_modules()} == before
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net(1).parameters(), strict=True))


def test_wrong_types():
    with pytest.raises(TypeError, match="state: expected a mapping, got list"):
        load_compressed(net(0), [])
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        load_compressed(3, {})
