"""ShareLoRA's own promises."""

from __future__ import annotations

import pytest
import torch
from oracles import same, trained
from torch import nn

from lora_kernels import load_adapter, save_adapter
from lora_kernels.adapters import LoRAConfig
from lora_kernels.integrations.checkpoint import read_weights
from lora_kernels.nn import LoRALinear, apply_lora, lora_layers

WIDTH, R, LAYERS = 6, 2, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return torch.tanh(self.q(x)) * self.v(x)


def new(share):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS)))
    config = LoRAConfig(
        r=R,
        lora_alpha=3,
        method="sharelora",
        method_options={"share": share},
        target_modules="all-linear",
        init_lora_weights=False,
    )
    return apply_lora(model, config, fuse=False)


@pytest.mark.parametrize("share", ["A", "B", "AB"])
def test_what_is_shared_and_its_gradient(share):
    model, x = new(share), torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    layers = lora_layers(model)
    for role in "qv":
        of_role = [layer.adapters["default"] for name, layer in layers.items() if name.endswith(role)]
        for factor in "AB":
            assert len({id(getattr(one, f"lora_{factor}")) for one in of_role}) == (
                1 if factor in share else LAYERS
            )
    assert trained(model) == 2 * R * WIDTH * sum(1 if factor in share else LAYERS for factor in "AB")

    def dense(y):
        for block in model:
            q, v = (
                nn.functional.linear(y, one.weight + 3 / R * a.lora_B @ a.lora_A, one.bias)
                for one, a in ((block.q, block.q.adapters["default"]), (block.v, block.v.adapters["default"]))
            )
            y = torch.tanh(q) * v
        return y

    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    same(model(x), dense(x), leaves, torch.randn(4, WIDTH, dtype=torch.float64))


def test_it_is_peft_s_lora_with_tied_factors():
    peft = pytest.importorskip("peft")
    model = new("A")
    torch.manual_seed(0)
    base = nn.Sequential(*(Block() for _ in range(LAYERS)))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=R, lora_alpha=3, target_modules=["q", "v"])).double()
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            other, adapter = theirs.base_model.model.get_submodule(name), layer.adapters["default"]
            other.lora_B["default"].weight.copy_(adapter.lora_B)
            tied = theirs.base_model.model.get_submodule(f"0{name[1:]}").lora_A["default"]
            tied.weight.copy_(adapter.lora_A)
            other.lora_A["default"] = tied
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(model(x), theirs(x))
    for one in (model, theirs):
        one(x).square().sum().backward()
    got = model.get_submodule("2.q").adapters["default"].lora_A.grad
    torch.testing.assert_close(
        got, theirs.base_model.model.get_submodule("2.q").lora_A["default"].weight.grad
    )


def test_the_file_holds_what_is_shared_once(tmp_path):
    model, x = new("AB"), torch.randn(4, WIDTH, dtype=torch.float64)
    save_adapter(model, tmp_path)
    assert len(read_weights(tmp_path)) == 4
    torch.manual_seed(0)
    other = load_adapter(nn.Sequential(*(Block() for _ in range(LAYERS))), tmp_path)
    torch.testing.assert_close(other(x), model(x))
    factors = {id(layer.adapters["default"].lora_A) for layer in lora_layers(other).values()}
    assert len(factors) == 2


def test_other_sizes_share_among_themselves_and_bad_options():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(k, 4)}) for k in (4, 4, 6)])
    apply_lora(model, LoRAConfig(r=R, method="sharelora", target_modules=["q"]))
    a = [layer.adapters["default"].lora_A for layer in lora_layers(model).values()]
    assert a[0] is a[1] and a[2].shape == (R, 6)
    with pytest.raises(ValueError, match=r"share: expected one of \('A', 'B', 'AB'\), got 'C'"):
        LoRALinear(4, 4, r=R, method="sharelora", method_options={"share": "C"})
