"""LoRA+, LoRA-FA and the Riemannian preconditioner, each by what its paper says of it."""

from __future__ import annotations

import copy

import pytest
import torch
from optim_models import batch, loss, ours, train, values
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn.pairs import lora_pairs
from lora_kernels.optim import LoRAFA, lora_plus, lora_plus_groups, riemannian


def test_lora_plus_groups_are_a_partition_with_their_rates():
    model = ours(target_modules=["wide", "tall", "table"], modules_to_save=["norm"], bias="lora_only")
    groups = lora_plus_groups(model, 0.1, 8, lr_embedding=0.3, weight_decay=0.2)
    places = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    assert len(places) == sum(len(group["params"]) for group in groups)
    want = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            table = name.startswith("table")
            slow = 0 if name.endswith("lora_A") else 2
            want[id(parameter)] = 1 if table else 3 if "norm" in name or "bias" in name else slow
    assert places == want
    assert [group["lr"] for group in groups] == [0.1, 0.3, 0.8, 0.8]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.2, 0.2, 0.0]


def test_lora_plus_of_ratio_one_is_the_optimizer_itself():
    one = ours(torch.float32)
    other = copy.deepcopy(one)
    train(one, lora_plus(one, lr=1e-2, ratio=1, foreach=False))
    trained = [p for p in other.parameters() if p.requires_grad]
    train(other, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, foreach=False))
    want = values(other)
    assert all(torch.equal(value, want[key]) for key, value in values(one).items())


def test_a_riemannian_step_does_not_see_how_the_product_is_factored():
    """(A, B) and (Q⁻¹A, BQ) are one product before a step and, without damping, after it."""
    one = ours(target_modules=["tall"])
    other = copy.deepcopy(one)
    mix = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4, dtype=torch.float64)
    pair, changed = next(lora_pairs(one)), next(lora_pairs(other))
    with torch.no_grad():
        changed.lora_a.copy_(torch.linalg.solve(mix, pair.lora_a))
        changed.lora_b.copy_(pair.lora_b @ mix)
    for model in (one, other):
        train(model, riemannian(model, torch.optim.SGD, lr=0.1, reg=1e-14), 3)
    products = [p.lora_b @ p.lora_a for p in (pair, changed)]
    torch.testing.assert_close(products[0], products[1], rtol=1e-8, atol=1e-8)
    plain = copy.deepcopy(ours(target_modules=["tall"]))
    train(plain, torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1), 3)
    assert (next(lora_pairs(plain)).lora_b @ next(lora_pairs(plain)).lora_a - products[0]).abs().max() > 1e-3


def test_a_riemannian_step_gives_the_gradients_back_and_takes_no_closure():
    model = ours()
    optimizer = riemannian(model, lr=1e-2)
    loss(model).backward()
    grads = [p.grad for p in model.parameters()]
    copies = [None if g is None else g.clone() for g in grads]
    optimizer.step()
    for parameter, grad, copied in zip(model.parameters(), grads, copies, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, copied)
    before = values(model)
    with pytest.raises(ValueError, match="closure: expected None"):
        optimizer.step(lambda: loss(model))
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())


def test_a_gram_matrix_without_an_inverse_leaves_the_gradient():
    model = ours(target_modules=["tall"])
    pair = next(lora_pairs(model))
    with torch.no_grad():
        pair.lora_a.fill_(float("nan"))
    pair.lora_a.grad, pair.lora_b.grad = torch.ones_like(pair.lora_a), torch.ones_like(pair.lora_b)
    before = pair.lora_b.clone()
    riemannian(model, torch.optim.SGD, lr=1.0).step()
    torch.testing.assert_close(pair.lora_b, before - 1)


def test_riemannian_on_factors_that_do_not_both_train():
    model = ours(method="lora_fa")
    with pytest.raises(ValueError, match="expected layers whose A and B both train"):
        riemannian(model, lr=1e-2)


def test_lora_fa_leaves_a_and_keeps_no_x():
    model = ours(torch.float32, init_lora_weights=True, target_modules=["wide", "tall"])
    optimizer = LoRAFA(model, 1e-2)
    before = {pair.name: pair.lora_a.clone() for pair in lora_pairs(model)}
    starts = {pair.name: pair.lora_b.clone() for pair in lora_pairs(model)}
    train(model, optimizer)
    for pair in lora_pairs(model):
        assert torch.equal(pair.lora_a, before[pair.name]) and not pair.lora_a.requires_grad
        assert not torch.equal(pair.lora_b, starts[pair.name])
    shapes = []
    x = torch.randn(50, 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model.wide(x)
    assert tuple(x.shape) not in shapes and (50, 4) in shapes


def test_lora_fa_steps_along_the_projected_gradient():
    """Sum of squares of the whole gradient that the first-order change keeps: s g' A = G Aᵀ(AAᵀ)⁻¹A."""
    from lora_kernels.optim.lora_fa import _project

    model = ours(target_modules=["tall"])
    pair = next(lora_pairs(model))
    whole = torch.randn(9, 20, dtype=torch.float64)
    grad = pair.scaling * whole @ pair.lora_a.detach().T
    (got,) = _project([grad], [pair])
    basis = torch.linalg.qr(pair.lora_a.detach().T).Q
    torch.testing.assert_close(
        pair.scaling * got @ pair.lora_a.detach(), whole @ basis @ basis.T, rtol=1e-6, atol=1e-6
    )


def test_lora_fa_with_an_a_of_lower_rank_stays_finite():
    model = ours(torch.float32, init_lora_weights=True, target_modules=["tall"])
    pair = next(lora_pairs(model))
    with torch.no_grad():
        pair.lora_a[2:] = 0
    train(model, LoRAFA(model, 1e-2), 3)
    assert pair.lora_b.isfinite().all() and pair.lora_b.abs().max() < 1


def test_lora_fa_on_factors_that_do_not_train():
    model = ours()
    for pair in lora_pairs(model):
        pair.lora_b.requires_grad_(False)
    with pytest.raises(ValueError, match="expected layers whose B trains"):
        LoRAFA(model)
    assert next(lora_pairs(model)).lora_a.requires_grad


@pytest.mark.parametrize("make", [lambda m: LoRAFA(m, 1e-2), lambda m: riemannian(m, lr=1e-2)])
def test_convolutions_and_embeddings(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Conv1d(5, 4, 2), nn.Flatten(), nn.Linear(20, 3))
    apply_lora(model, LoRAConfig(r=2, target_modules=["0", "1", "3"]))
    before = values(model)
    optimizer = make(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch().view(3, 5) % 9).square().mean().backward()
        optimizer.step()
    changed = {k for k, value in values(model).items() if not torch.equal(value, before[k])}
    assert {"0.adapters.default.lora_B", "1.adapters.default.lora_B", "3.adapters.default.lora_B"} <= changed
