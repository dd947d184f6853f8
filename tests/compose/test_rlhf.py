"""PPO's functions against loops over tokens, and one base under policy, value and reference."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kernels.compose import PENALTIES, Rollout, gae, kl_penalty, ppo_loss, token_rewards, whiten

WIDE = torch.float64


def draws(*shape):
    return torch.randn(*shape, dtype=WIDE)


def one_penalty(p, q, kind):
    ratio = math.log(p) - math.log(q)
    middle = (p + q) / 2
    return {
        "kl": ratio,
        "clamped_kl": max(ratio, 0),
        "bregman": q / p - 1 + ratio,
        "squared_error": ratio**2 / 2,
        "jensen_shannon": (max(math.log(p / middle), 0) + max(math.log(q / middle), 0)) / 2,
    }[kind]


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties(kind):
    torch.manual_seed(0)
    p, q = torch.rand(2, 50, dtype=WIDE).clamp(1e-3)
    want = torch.tensor([one_penalty(*both, kind) for both in zip(p.tolist(), q.tolist(), strict=True)])
    got = kl_penalty(p.log(), q.log(), kind)
    torch.testing.assert_close(got, want.to(WIDE))
    assert not kl_penalty(p.log(), p.log(), kind).any()
    if kind in ("bregman", "squared_error", "jensen_shannon", "clamped_kl"):
        assert got.min() >= 0
    if kind == "jensen_shannon":
        assert got.max() <= math.log(2) / 2
        assert torch.isfinite(kl_penalty(p.log(), q.log() - 500, kind)).all()
    x = p.log().requires_grad_()
    if kind not in ("clamped_kl", "jensen_shannon"):
        assert torch.autograd.gradcheck(lambda one: kl_penalty(one, q.log(), kind), x)


def test_advantages_and_rewards_are_the_loops():
    torch.manual_seed(0)
    rewards, values = draws(3, 6), draws(3, 6)
    advantages, returns = gae(rewards, values, 0.9, 0.8)
    for i in range(3):
        for t in range(6):
            want = 0.0
            for later in range(t, 6):
                after = values[i, later + 1] if later < 5 else 0.0
                want += (0.9 * 0.8) ** (later - t) * (rewards[i, later] + 0.9 * after - values[i, later])
            torch.testing.assert_close(advantages[i, t], torch.as_tensor(want))
    torch.testing.assert_close(returns, advantages + values)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    scores, penalty = draws(3), draws(3, 6)
    got = token_rewards(scores, penalty, mask, 0.5)
    want = torch.where(mask, -0.5 * penalty, 0.0)
    for i, last in enumerate((3, 0, 5)):
        want[i, last] += scores[i]
    torch.testing.assert_close(got, want)
    white = whiten(rewards, mask)
    torch.testing.assert_close(white[mask].mean(), torch.zeros((), dtype=WIDE), atol=1e-12, rtol=0)
    torch.testing.assert_close(white[mask].std(unbiased=False), torch.ones((), dtype=WIDE), rtol=1e-6, atol=0)
    torch.testing.assert_close(whiten(rewards, mask, shift=False)[mask].mean(), rewards[mask].mean())


def test_the_loss_is_the_loop_with_its_gradients():
    torch.manual_seed(0)
    mask = torch.rand(4, 5) > 0.3
    rollout = Rollout(draws(4, 5), draws(4, 5), draws(4, 5), draws(4, 5), mask)
    logprobs = (rollout.logprobs + 0.3 * draws(4, 5)).requires_grad_()
    values = (rollout.values + 0.3 * draws(4, 5)).requires_grad_()
    total = 0.0
    for i, t in mask.nonzero().tolist():
        ratio = torch.exp(logprobs[i, t] - rollout.logprobs[i, t])
        a, old, r = rollout.advantages[i, t], rollout.values[i, t], rollout.returns[i, t]
        policy = -min(a * ratio, a * min(max(ratio, 0.8), 1.2))
        near = min(max(values[i, t], old - 0.2), old + 0.2)
        total = total + policy + 0.05 * max((values[i, t] - r) ** 2, (near - r) ** 2)
    want, got = total / int(mask.sum()), ppo_loss(logprobs, values, rollout)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(loss, (logprobs, values), retain_graph=True) for loss in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    assert not grads[0][0][~mask].any()


def test_bad_input():
    x, short = draws(2, 3), draws(2, 2)
    with pytest.raises(ValueError, match=r"kind: expected one of kl, .* got 'js'"):
        kl_penalty(x, x, "js")
    rollout = Rollout(x, x, x, x, x > 9)
    calls = {
        "reference: expected shape": lambda: kl_penalty(x, short),
        "values: expected shape": lambda: gae(x, short),
        "advantages: expected shape": lambda: ppo_loss(x, x, rollout._replace(advantages=short)),
        "scores: expected shape": lambda: token_rewards(x, x, x > 0),
        "mask: expected at least one token": lambda: token_rewards(x[:, 0], x, x > 9),
        "mask: expected shape": lambda: whiten(x, short > 0),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
