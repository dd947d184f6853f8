"""One pass under several adapters against a pass for each, and Switch and Composite on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.compose import SwitchSchedule, composite_forward, forward_each
from lora_kernels.nn import disable_adapters, lora_layers, set_adapter, train_adapters

WIDE = torch.float64


class Denoiser(nn.Module):
    """Not linear in its weights; reads a step that belongs to no sample."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x, step, context=None):
        y = self.down(torch.tanh(self.up(x))) * step
        return {"sample": y, "aside": (y.sum(-1), step)} if context is None else y + context


def model_of(*names):
    torch.manual_seed(0)
    model = Denoiser().to(WIDE)
    specs = {name: LoRAConfig(r=2 + i, target_modules=["up", "down"]) for i, name in enumerate(names)}
    train_adapters(model, specs)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for adapter in layer.adapters.values():
                adapter.lora_B.normal_()
    return model


def alone(model, name, *args, **kwargs):
    if name is None:
        with disable_adapters(model):
            return model(*args, **kwargs)
    active = [one for one in model.up.adapters]
    set_adapter(model, name)
    y = model(*args, **kwargs)
    set_adapter(model, active)
    return y


def test_one_pass_is_a_pass_for_each_with_its_gradients():
    model, names = model_of("policy", "value", "other"), ["policy", None, "value"]
    x, step = torch.randn(3, 4, 6, dtype=WIDE), torch.tensor(0.5, dtype=WIDE)
    weights = torch.randn(3, 4, 6, dtype=WIDE)
    together, apart = [], []
    for name, one in zip(names, forward_each(model, names, x, step=step), strict=True):
        want = alone(model, name, x, step=step)
        torch.testing.assert_close(one["sample"], want["sample"])
        torch.testing.assert_close(one["aside"][0], want["aside"][0])
        together.append((one["sample"] * weights).sum())
        apart.append((want["sample"] * weights).sum())
    parameters = [p for layer in lora_layers(model).values() for p in layer.adapters["policy"].parameters()]
    got, want = (torch.autograd.grad(losses[0] + losses[2], parameters) for losses in (together, apart))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    assert model.up.active == ("policy", "value", "other")


def test_without_gradients_only_the_adapters_of_the_batch_are_stacked(monkeypatch):
    from lora_kernels.nn import mixed

    model, seen = model_of("a", "b", "c"), []
    stack = mixed.stack_adapters
    monkeypatch.setattr(mixed, "stack_adapters", lambda *given: seen.append(len(given[0])) or stack(*given))
    x = torch.randn(2, 6, dtype=WIDE)
    with torch.no_grad():
        forward_each(model, ["b", None], x, 1.0)
        (base,) = forward_each(model, [None], x, 1.0)
    assert seen == [1, 1]
    torch.testing.assert_close(base["sample"], alone(model, None, x, 1.0)["sample"], rtol=0, atol=0)


@torch.no_grad()
def test_composite_is_the_mean_of_the_passes_and_not_the_merged_adapter():
    model, names = model_of("a", "b", "c"), ["a", "b", "c"]
    x, context = torch.randn(3, 6, dtype=WIDE), torch.randn(3, 6, dtype=WIDE)
    each = [alone(model, name, x, 0.3, context=context) for name in names]
    got = composite_forward(model, names, x, 0.3, context=context)
    torch.testing.assert_close(got, sum(each) / 3)
    torch.testing.assert_close(composite_forward(model, names, x, 0.3, context, combine="sum"), sum(each))
    torch.testing.assert_close(composite_forward(model, ["b"], x, 0.3), each[1] - context)
    set_adapter(model, names)
    assert not torch.allclose(got, model(x, 0.3, context=context), atol=1e-2)
    guided = [one[:1] + 7 * (one[1:2] - one[:1]) for one in each]  # halves without and with a condition
    torch.testing.assert_close(got[:1] + 7 * (got[1:2] - got[:1]), sum(guided) / 3)


def test_switch_takes_turns():
    switch = SwitchSchedule(["a", "b"], period=3)
    paper = [int(((t - 1) % (2 * 3)) / 3) for t in range(1, 14)]
    assert [switch.at(t) for t in range(13)] == ["ab"[i] for i in paper]
    late = SwitchSchedule(["a", "b"], period=3, late=True)
    turn, code = 0, []
    for step in range(13):  # what the published callback does at the end of each step
        code.append("ab"[turn])
        turn = (turn + 1) % 2 if step > 0 and step % 3 == 0 else turn
    assert [late.at(t) for t in range(13)] == code
    assert {SwitchSchedule(["a"]).at(t) for t in range(20)} == {"a"}
    model = model_of("a", "b")
    for step in range(7):
        switch.choose(model, step)
        assert model.up.active == (switch.at(step),)


def test_bad_input():
    model, x = model_of("a"), torch.randn(2, 6, dtype=WIDE)
    for names in ("a", [], ["a", "a"]):
        with pytest.raises(ValueError, match="adapters: expected names or None, each once"):
            forward_each(model, names, x, 1.0)
    with pytest.raises(ValueError, match="args: expected a tensor of samples"):
        forward_each(model, ["a"], 1.0)
    with pytest.raises(ValueError, match="adapter_names: expected a or __base__, got 'b'"):
        forward_each(model, ["b"], x, 1.0)
    with pytest.raises(ValueError, match="combine: expected 'mean' or 'sum', got 'max'"):
        composite_forward(model, ["a"], x, 1.0, combine="max")
    for given, message in (((["a"], 0), "period: expected at least 1"), (("a",), "names: expected adapters")):
        with pytest.raises(ValueError, match=message):
            SwitchSchedule(*given)
    with pytest.raises(ValueError, match="step: expected at least 0"):
        SwitchSchedule(["a"]).at(-1)
