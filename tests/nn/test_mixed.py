"""Many adapters trained at once on one base: each gets the gradient that it gets alone."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.nn import apply_lora, merge_adapters, mixed_adapters, set_adapter, train_adapters
from lora_kernels.reference.dropout import keep_of, row_dropout_mask
from lora_kernels.testing import assert_close

RANKS = {"a": 1, "b": 4, "c": 7, "d": 2, "e": 16, "f": 3}
NAMES = ["a", "b", "__base__", "c", "d", "b", "e", "f"]


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 9)
        self.to(dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def configs(dropout=0.0):
    targets = {"f": ["up"]}
    return {
        name: LoRAConfig(
            r=rank,
            lora_alpha=3 * i + 1,
            lora_dropout=dropout * i / 6,
            target_modules=targets.get(name, ["up", "down"]),
            init_lora_weights=False,
        )
        for i, (name, rank) in enumerate(RANKS.items(), 1)
    }


def trained(dtype=torch.float32, dropout=0.0):
    model = Model(dtype)
    return model, train_adapters(model, configs(dropout))


def gradients(parameters):
    return {name: [p.grad for p in many] for name, many in parameters.items()}


def alone(model, parameters, x, dy):
    """Every adapter in a batch of its own samples."""
    results = {}
    for name in parameters:
        rows = [i for i, other in enumerate(NAMES) if other == name]
        set_adapter(model, name)
        (model(x[rows]) * dy[rows]).sum().backward()
        results[name] = [p.grad for p in parameters[name]]
    return results


def test_each_gradient_is_that_of_the_adapter_alone():
    x, dy = torch.randn(8, 5, 12), torch.randn(8, 5, 9)
    model, parameters = trained()
    with mixed_adapters(model, NAMES):
        y = model(x)
    (y * dy).sum().backward()
    results = []
    for dtype in (torch.float32, torch.float64):
        other, theirs = trained()
        other.to(dtype)
        results.append(alone(other, theirs, x.to(dtype), dy.to(dtype)))
    for name, grads in gradients(parameters).items():
        for grad, eager, exact in zip(grads, *(r[name] for r in results), strict=True):
            assert_close(grad, eager, exact, name, ulps=2)


def test_every_sample_is_its_adapter_alone():
    x = torch.randn(8, 5, 12)
    model, _ = trained()
    with mixed_adapters(model, NAMES):
        y = model(x)
    for i, name in enumerate(NAMES):
        set_adapter(model, [] if name == "__base__" else name)
        torch.testing.assert_close(y[i], model(x[i]))


def test_an_absent_adapter_gets_no_gradient_and_its_optimiser_leaves_it():
    model, parameters = trained()
    optimisers = {name: torch.optim.SGD(many, lr=0.1) for name, many in parameters.items()}
    before = copy.deepcopy(model.state_dict())
    with mixed_adapters(model, ["b", "e", "b"]):
        model(torch.randn(3, 12)).sum().backward()
    for name, many in gradients(parameters).items():
        assert all(g is not None and bool(g.any()) == (name in "be") for g in many)
    for optimiser in optimisers.values():
        optimiser.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != (".adapters.b." in key or ".adapters.e." in key)


def test_dropout_of_the_backward_is_that_of_the_forward():
    """By the mask that the seed gives: y and every gradient of one linear, in fp64."""
    model, _ = trained(torch.float64, dropout=0.6)
    layer, x = model.up, torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(8, 20, dtype=torch.float64)
    torch.manual_seed(5)
    with mixed_adapters(model, NAMES):
        y = layer(x)
    y.backward(dy)
    got = [y.detach(), x.grad.clone(), *(layer.adapters[n].lora_A.grad.clone() for n in RANKS)]
    x.grad = None
    model.zero_grad()
    torch.manual_seed(5)
    seed = torch.empty(1, dtype=torch.int64).random_()
    ps = torch.tensor([0.0 if n == "__base__" else layer.adapters[n].lora_dropout for n in NAMES])
    keep = keep_of(row_dropout_mask(seed, ps, 12), 12)
    rows = []
    for m, name in enumerate(NAMES):
        row = torch.nn.functional.linear(x[m], layer.weight, layer.bias)
        if name != "__base__":
            adapter = layer.adapters[name]
            dropped = torch.where(keep[m], x[m], 0) / (1 - adapter.lora_dropout)
            row = row + adapter.scaling * adapter.lora_B @ (adapter.lora_A @ dropped)
        rows.append(row)
    expected = torch.stack(rows)
    expected.backward(dy)
    assert not keep.all()
    for ours, theirs in zip(
        got, [expected, x.grad, *(layer.adapters[n].lora_A.grad for n in RANKS)], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_plain_loop_trains_all_as_it_trains_each():
    x, target = torch.randn(8, 12).double(), torch.randn(8, 9).double()
    model, parameters = trained(torch.float64)
    steps = {name: torch.optim.SGD(many, lr=0.01) for name, many in parameters.items()}
    for _ in range(3):
        with mixed_adapters(model, NAMES):
            ((model(x) - target) ** 2).sum().backward()
        for step in steps.values():
            step.step()
            step.zero_grad()
    for name in RANKS:
        single = Model(torch.float64)
        apply_lora(single, configs()[name], name)
        fresh, _ = trained(torch.float64)
        single.load_state_dict({k: v for k, v in fresh.state_dict().items() if k in single.state_dict()})
        rows = [i for i, other in enumerate(NAMES) if other == name]
        step = torch.optim.SGD([p for p in single.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            ((single(x[rows]) - target[rows]) ** 2).sum().backward()
            step.step()
            step.zero_grad()
        for key, value in single.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-8)


def test_outside_of_the_block_the_layers_are_as_before():
    model, _ = trained()
    x = torch.randn(2, 12)
    before = model(x)
    with (
        pytest.raises(ValueError, match="expected one for each of 2 samples, got 1"),
        mixed_adapters(model, ["a"]),
    ):
        model(x)
    assert torch.equal(model(x), before)


def test_bad_input():
    model, _ = trained()
    with pytest.raises(ValueError, match="adapter_names: expected a, b"), mixed_adapters(model, ["absent"]):
        pass
    with pytest.raises(ValueError, match="configs: expected at least one"):
        train_adapters(Model(), {})
    merge_adapters(model)
    with pytest.raises(RuntimeError, match="mix adapters"), mixed_adapters(model, ["a"]):
        pass
