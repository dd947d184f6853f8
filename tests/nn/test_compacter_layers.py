"""PHM layers against torch.kron, and Compacter's bottlenecks in a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.nn import CompacterAdapter, PHMLinear, insert_compacter

WIDE = torch.float64


@pytest.mark.parametrize("n,rank", [(4, 1), (2, 3), (1, 2)])
def test_phm_is_the_sum_of_kronecker_products(n, rank):
    layer = PHMLinear(12, 8, n, rank, dtype=WIDE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x, dy = torch.randn(2, 5, 12, dtype=WIDE, requires_grad=True), torch.randn(2, 5, 8, dtype=WIDE)
    h = sum(torch.kron(layer.rule[i], layer.left[i] @ layer.right[i]) for i in range(n))
    y, want = layer(x), x @ h + layer.bias
    torch.testing.assert_close(y, want)
    wanted = (x, *layer.parameters())
    for one, other in zip(*(torch.autograd.grad(z, wanted, dy) for z in (y, want)), strict=True):
        torch.testing.assert_close(one, other)


def test_counts_of_the_paper_and_a_start_next_to_the_identity():
    adapter = CompacterAdapter(768)
    own = sum(p.numel() for p in adapter.parameters()) - adapter.down.rule.numel()
    assert own == 2 * (768 + 24) + 24 + 768 == 2376 and adapter.down.rule is adapter.up.rule
    h = torch.randn(3, 768)
    assert 0 <= (adapter(h) - h).abs().max() < 1e-5


def test_in_a_model_all_share_one_rule():
    model = nn.ModuleDict(
        {"a": nn.Linear(16, 32), "norm": nn.LayerNorm(32), "b": nn.Linear(32, 16), "c": nn.Linear(16, 64)}
    )
    rule = insert_compacter(model, ["a", "c"], reduction=8)
    assert model["a"].compacter.up.rule is rule is model["c"].compacter.down.rule
    assert not hasattr(model["b"], "compacter")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "compacter" in n or n.startswith("norm")}
    x, adapter = torch.randn(2, 16), model["a"].compacter
    with torch.no_grad():
        rule.normal_()
    h = F.linear(x, model["a"].weight, model["a"].bias)
    want = h + adapter.up(F.gelu(adapter.down(h), approximate="tanh"))
    torch.testing.assert_close(model["a"](x), want)
    (model["a"](x).sum() + model["c"](x).sum()).backward()
    assert rule.grad.abs().max() > 0


def test_bad_options_are_named_and_change_nothing():
    model = nn.ModuleDict({"a": nn.Linear(16, 32), "b": nn.LayerNorm(32)})
    for names, reduction, words in (
        (["nope"], 8, "target_modules: expected ends"),
        (["a", "b"], 8, "target_modules: expected linears without a compacter, got b"),
        (["a"], 7, "reduction: expected a divisor of features = 32, got 7"),
        (["a"], 16, "n: expected a divisor of out_features = 2, got 4"),
    ):
        with pytest.raises(ValueError, match=words):
            insert_compacter(model, names, reduction)
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model["a"], "compacter")
    with pytest.raises(ValueError, match=r"rule: expected shape \(4, 4, 4\)"):
        PHMLinear(8, 8, rule=nn.Parameter(torch.zeros(2, 2, 2)))
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        PHMLinear(8, 8, rank=0)
