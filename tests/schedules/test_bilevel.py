"""BiLoRA and AutoLoRA: the hypergradient against autograd, and what steps leave alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from optim_models import batch, loss, ours

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import AutoLoRA, BiLoRA, orthogonality
from lora_kernels.schedules._common import active_of
from lora_kernels.schedules.autolora_rank import select_rank
from lora_kernels.schedules.bilora import hypergradient


def toy():
    """Two losses of V and e that are not quadratic, in fp64."""
    torch.manual_seed(0)
    v = [torch.nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2)]
    e = [torch.nn.Parameter(torch.randn(3, dtype=torch.float64))]
    lower = lambda v, e: (torch.tanh(v[0] * e[0]) - v[1]).square().sum()  # noqa: E731
    upper = lambda v, e: (v[0] * v[1] - e[0].sin()).square().sum()  # noqa: E731
    return v, e, lower, upper


def test_the_unrolled_gradient_is_that_of_autograd():
    v, e, lower, upper = toy()
    xi = 0.05
    grads = torch.autograd.grad(lower(v, e), v, create_graph=True)
    after = [one - xi * grad for one, grad in zip(v, grads, strict=True)]
    want = torch.autograd.grad(upper(after, e), e)
    before = [one.detach().clone() for one in v]
    got = hypergradient(lambda: lower(v, e), lambda: upper(v, e), v, e, radius=1e-4, unroll=xi)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(one, kept) for one, kept in zip(v, before, strict=True))
    assert all(one.grad is None for one in (*v, *e))


def test_the_plain_form_has_no_factor():
    v, e, lower, upper = toy()
    mixed = torch.autograd.grad(lower(v, e), v, create_graph=True)
    at = torch.autograd.grad(upper(v, e), v)
    product = torch.autograd.grad(sum((m * a).sum() for m, a in zip(mixed, at, strict=True)), e)
    want = torch.autograd.grad(upper(v, e), e)[0] - product[0]
    got = hypergradient(lambda: lower(v, e), lambda: upper(v, e), v, e, radius=1e-4)
    torch.testing.assert_close(got[0], want, rtol=1e-6, atol=1e-6)


def model(kind="softmax"):
    made = ours(init_lora_weights=True, method="bilora", method_options={"values": kind})
    return made


def test_values_step_and_nothing_else_does():
    made = model()
    for one in active_of(made, "bilora").values():  # B = 0 has no gradient for them
        one.lora_B.data.normal_()
    batches = itertools.cycle([0, 1])
    schedule = BiLoRA(made, lambda seed: loss(made, seed), batches, itertools.cycle([2, 3]))
    before = {name: p.clone() for name, p in made.named_parameters()}
    schedule.step()
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith("values")}
    assert not any(p.requires_grad for name, p in made.named_parameters() if name.endswith("values"))


def test_orthogonality_is_its_formula():
    made = model()
    want = 0.0
    for one in active_of(made, "bilora").values():
        unit = torch.eye(4, dtype=torch.float64)
        want += (one.lora_B.T @ one.lora_B - unit).square().sum()
        want += (one.lora_A @ one.lora_A.T - unit).square().sum()
    torch.testing.assert_close(orthogonality(made), want)


def test_ranks_by_both_rules():
    values = torch.tensor([2.0, 0.5, 0.5, 1.0])
    assert (select_rank(values), select_rank(values, "raw")) == (1, 2)
    assert select_rank(torch.ones(4)) == 4
    made = model()
    search = AutoLoRA(made, lambda seed: loss(made, seed), itertools.cycle([0]), itertools.cycle([1]))
    assert all((one.gate() == 0.25).all() for one in active_of(made, "bilora").values())
    active_of(made, "bilora")["wide"].values.data.copy_(values)
    assert search.ranks() == {"wide": 1, "tall": 4, "square": 4}
    found = ours(rank_pattern=search.rank_pattern("raw"))
    assert found.wide.adapters["default"].r == 2
    with pytest.raises(ValueError, match="rule: expected one of softmax, raw, got 'all'"):
        search.ranks("all")


def test_bad_input():
    with pytest.raises(ValueError, match="model: expected adapters of LoRAConfig"):
        BiLoRA(ours(), loss, iter(()), iter(()))
    with pytest.raises(ValueError, match="expected method_options values='softmax', got 'real'"):
        AutoLoRA(model("real"), loss, iter(()), iter(()))
    with pytest.raises(ValueError, match="radius: expected 0 < radius"):
        BiLoRA(model(), loss, iter(()), iter(()), radius=0)
    with pytest.raises(ValueError, match=r"method_options: values: expected one of"):
        apply_lora(
            torch.nn.Sequential(torch.nn.Linear(2, 2)),
            LoRAConfig(
                r=1, target_modules="all-linear", method="bilora", method_options={"values": "binary"}
            ),
        )
    assert batch().shape == (5, 3)
