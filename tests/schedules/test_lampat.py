"""LAMPAT: gradients, the ball, padding, and the double backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import adversarial_step
from lora_kernels.schedules.lampat import _gradient, _moved, _start


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    return apply_lora(made, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False), fuse=False)


E = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(logits):
    return nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(12) % 5)


def grads(made):
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def test_one_step_of_nothing_is_plain_training():
    one, other = model(), model()
    value = adversarial_step(one, E, loss, steps=1, smooth=0.0, start=0.0)
    want = loss(other(E))
    want.backward()
    assert value == want.item() and grads(one).keys() == grads(other).keys() and len(grads(one)) == 4
    assert all(torch.equal(grad, grads(other)[name]) for name, grad in grads(one).items())


def test_two_steps_by_hand():
    made, other = model(), model()
    got = adversarial_step(made, E, loss, steps=2, lr=0.1, radius=0.15, start=0.1, seed=3)
    delta = _start(E, None, 0.1, 3).requires_grad_(True)
    total = 0.0
    for k in range(2):
        logits = other(E + delta)
        gap = (logits - other(E).detach()).square().mean()
        value = (loss(logits) + gap) / 2
        total += value.item()
        value.backward(retain_graph=True)
        g = torch.autograd.grad(gap, delta)[0]
        delta = delta.detach() + 0.1 * g / g.flatten(1).norm(dim=1)[:, None, None]
        norms = delta.flatten(1).norm(dim=1)[:, None, None]
        delta = (delta * (0.15 / norms).clamp(max=1.0)).requires_grad_(True)
        assert k or (delta.flatten(1).norm(dim=1) <= 0.15 + 1e-12).all()
    assert got == pytest.approx(total, rel=1e-12)
    for name, grad in grads(made).items():
        torch.testing.assert_close(grad, grads(other)[name], rtol=1e-10, atol=1e-12)


def test_padding_starts_at_zero_and_sizes():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    delta = _start(E, mask, 1.0, 0)
    assert not delta[mask == 0].any() and delta[mask == 1].all()
    assert delta.flatten(1).norm(dim=1).min() > 0.3 and delta.flatten(1).norm(dim=1).max() < 2


def test_the_curvature_goes_through_our_backward_pass():
    """H = ∂(Σ g)/∂δ against a dense model, and a Newton step that stays finite."""
    made = model()
    dense = [made[0].merged_weight(), made[2].merged_weight()]
    biases = [made[0].bias, made[2].bias]

    def plain(e):
        h = torch.tanh(nn.functional.linear(e, dense[0], biases[0]))
        return nn.functional.linear(h, dense[1], biases[1])

    found = []
    for forward in (made, plain):
        delta = (0.1 * torch.ones_like(E)).requires_grad_(True)
        found.append(_gradient((forward(E + delta) - 1).square().mean(), delta, "newton"))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    moved = _moved(torch.zeros_like(E), *found[0], 0.01, 10.0)
    assert moved.isfinite().all() and moved.any()
    assert adversarial_step(made, E, loss, mode="newton", lr=1e-3, radius=1.0) > 0


def test_bad_input():
    for options, message in (
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"mode": "sgd"}, "mode: expected one of pgd, newton, got 'sgd'"),
        ({"radius": -1.0}, "radius: expected 0 <= radius"),
    ):
        with pytest.raises(ValueError, match=message):
            adversarial_step(model(), E, loss, **options)
    with pytest.raises(ValueError, match="embeddings: expected 3 dimensions, got 2"):
        adversarial_step(model(), E[0], loss)
