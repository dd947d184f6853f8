"""LoNAS: a narrower layer is the small layer made of the slices, and costs no copy."""

from __future__ import annotations

import pytest
import torch
from dense_oracle import IN, OUT, WIDE, R, linear, refuses, shaken
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import LoRALinear, QuantizedLinear, Slice, elastic


def small_of(layer, rank, outs, ins):
    """The layer of the materialised slices."""
    one = layer.adapters["default"]
    small = LoRALinear(ins, outs, r=rank, lora_alpha=one.scaling * rank, dtype=WIDE)
    with torch.no_grad():
        small.weight.copy_(layer.weight[:outs, :ins])
        small.bias.copy_(layer.bias[:outs])
        small.adapters["default"].lora_A.copy_(one.lora_A[:rank, :ins])
        small.adapters["default"].lora_B.copy_(one.lora_B[:outs, :rank])
    return small


@pytest.mark.parametrize("sizes", [(R, OUT, IN), (2, OUT, IN), (3, 7, IN), (1, 5, 8)])
def test_a_slice_is_the_small_layer(sizes):
    layer, (rank, outs, ins) = linear("lonas"), sizes
    small, x = small_of(layer, *sizes), torch.randn(2, 3, ins, dtype=WIDE)
    with elastic(layer, {"": Slice(rank, outs, ins)}):
        y = layer(x)
    torch.testing.assert_close(y, small(x))
    dy = torch.randn_like(y)
    one, other = layer.adapters["default"], small.adapters["default"]
    grads = torch.autograd.grad(y, [one.lora_A, one.lora_B], dy)
    a, b = torch.autograd.grad(small(x), [other.lora_A, other.lora_B], dy)
    torch.testing.assert_close(grads[0][:rank, :ins], a)
    torch.testing.assert_close(grads[1][:outs, :rank], b)
    assert grads[0].count_nonzero() == rank * ins and grads[1].count_nonzero() == outs * rank
    assert "forward" not in vars(layer)


def test_ranks_keep_the_scale_and_are_views():
    layer = linear("lonas", ranks=[4, 2])
    one = layer.adapters["default"]
    assert one.ranks == (4, 2)
    one.set_rank(2)
    update = one.lower()
    assert update.scaling == 6 / R and update.lora_a.data_ptr() == one.lora_A.data_ptr()
    assert update.lora_b.data_ptr() == one.lora_B.data_ptr() and update.lora_b.shape == (OUT, 2)
    with pytest.raises(ValueError, match="rank: expected one of 1 to 4, got 5"):
        one.set_rank(5)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(IN, 16), nn.Linear(IN, 16), nn.Linear(16, IN)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def test_narrower_mlps_inside_a_model_with_groups():
    torch.manual_seed(0)
    model = apply_lora(MLP().to(WIDE), LoRAConfig(r=R, method="lonas", target_modules="all-linear"))
    shaken(model)
    x, width = torch.randn(3, IN, dtype=WIDE), 10
    whole = model(x)
    gate, up = (small_of(layer, R, width, IN)(x) for layer in (model.gate, model.up))
    want = small_of(model.down, R, IN, width)(torch.nn.functional.silu(gate) * up)
    slices = {
        "gate": Slice(out_features=width),
        "up": Slice(out_features=width),
        "down": Slice(in_features=width),
    }
    with elastic(model, slices):
        torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(model(x), whole)


def test_what_is_refused_leaves_no_trace():
    layer = linear("lonas")
    model = nn.Sequential(
        layer, LoRALinear.from_linear(QuantizedLinear.from_linear(nn.Linear(IN, OUT), "int8"))
    )
    for slices, message in (
        ({"0": Slice(), "2": Slice()}, "expected layers that are a LoRALinear, got '2'"),
        ({"0": Slice(rank=5)}, "0: expected rank of 1 to 4, got 5"),
        ({"0": Slice(), "1": Slice(in_features=3)}, "1: expected a dense weight to narrow"),
    ):
        with pytest.raises(ValueError, match=message), elastic(model, slices):
            pass
        assert all("forward" not in vars(one) for one in model)
    refuses(r"ranks: expected ranks of 1 to 4, got \(8,\)", method="lonas", method_options={"ranks": [8]})
