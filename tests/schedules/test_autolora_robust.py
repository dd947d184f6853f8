"""AutoLoRa: which branch trains what, the loss, the attack, the automatic rate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optim_models import accelerated, batch, net, ours

from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import MinAutoLR, TwoBranches, autolora_lambdas, pgd, two_branch_loss


def grads(model):
    pairs = list(lora_pairs(model))
    factors = [pair.lora_a.grad for pair in pairs] + [pair.lora_b.grad for pair in pairs]
    return factors, [pair.base.weight.grad for pair in pairs]


@pytest.mark.parametrize("make", [ours, accelerated], ids=["ours", "peft"])
def test_each_branch_trains_its_own(make):
    model = make()
    branches = TwoBranches(model)
    y = branches.natural(batch())
    y.square().sum().backward()
    factors, weights = grads(model)
    assert all(g is not None and g.any() for g in factors) and all(g is None for g in weights)
    model.zero_grad()
    plain = branches.adversarial(batch())
    torch.testing.assert_close(plain, net()(batch()))
    assert not torch.allclose(plain, y)
    plain.square().sum().backward()
    factors, weights = grads(model)
    assert all(g is None for g in factors) and all(g is not None and g.any() for g in weights)


def test_both_in_one_loss():
    model = ours()
    branches = TwoBranches(model, head=[model.norm])
    labels = torch.arange(15) % 9
    z_n, z_a = (one(batch()).flatten(0, 1) for one in (branches.natural, branches.adversarial))
    l1, l2 = autolora_lambdas(0.25)
    assert (l1, l2) == (0.75, 1.5) and l1 + l2 / 6 == 1
    got = two_branch_loss(z_n, z_a, labels, l1, l2)
    p, log_q = z_n.softmax(-1), z_a.log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum() / 15
    want = l1 * F.cross_entropy(z_n, labels) + (1 - l1) * F.cross_entropy(z_a, labels) + l2 * kl
    torch.testing.assert_close(got, want)
    got.backward()
    factors, weights = grads(model)
    assert all(g.any() for g in (*factors, *weights)) and model.norm.weight.grad.any()


def test_the_attack_stays_in_its_ball_and_hurts():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    x, labels = torch.rand(8, 6), torch.arange(8) % 3
    attacked = pgd(model, x, labels, radius=0.1, step=0.03)
    assert (attacked - x).abs().max() <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert F.cross_entropy(model(attacked), labels) > F.cross_entropy(model(x), labels)


def test_the_rate_on_a_script():
    rate = MinAutoLR((0, 2, 4, 6), lr=0.1)
    script = (0.1, 0.2, 0.3, 0.2, 0.2, 0.2)  # rises twice; once; not at all
    cuts = [rate.update(accuracy) for accuracy in script]
    assert cuts == [False, False, False, True, False, True]
    assert rate.lr == pytest.approx(0.025)
    other = MinAutoLR((0, 2, 4, 6), lr=0.1)
    for accuracy in script[:3]:
        other.update(accuracy)
    third = MinAutoLR((0, 2, 4, 6), lr=0.1)
    third.load_state_dict(other.state_dict())
    assert [third.update(accuracy) for accuracy in script[3:]] == cuts[3:]


def test_bad_input():
    with pytest.raises(ValueError, match="model: expected a model with LoRA layers"):
        TwoBranches(net())
    with pytest.raises(ValueError, match="accuracy: expected 0 <= accuracy <= 1, got 2"):
        autolora_lambdas(2)
    with pytest.raises(ValueError, match="checks: expected at least two epochs that rise from 0"):
        MinAutoLR((0, 5, 3))
    with pytest.raises(ValueError, match="state: expected 'lr', got 'steps'"):
        MinAutoLR().load_state_dict({"steps": 1})
