"""RLHF with LoRA: PPO on a bandit of three tokens, with the Jensen-Shannon penalty and without."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.compose import Rollout, forward_each, kl_penalty, ppo_loss, token_rewards
from lora_kernels.nn import train_adapters

CLAIM = "reward rises by over 0.2; the Jensen-Shannon penalty keeps the KL below that without; W is as it was"
REWARDS = torch.tensor([0.0, 0.3, 1.0])


def run(seed: int) -> dict[str, float]:
    """The gain of reward and the KL to the reference with the penalty and without; how far W moved."""
    gain, kl, moved = _train(seed, 1.0)
    free_gain, free_kl, free_moved = _train(seed, 0.0)
    figures = {"gain": gain, "kl": kl, "gain_free": free_gain, "kl_free": free_kl}
    return {**figures, "moved": max(moved, free_moved)}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["gain"] > 0.2 and one["kl"] < one["kl_free"] and one["moved"] == 0 for one in figures)


def _train(seed, beta):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    before = [p.detach().clone() for p in model.parameters()]
    base = list(model.parameters())
    specs = {name: LoRAConfig(r=4, lora_alpha=8, target_modules=["0", "2"]) for name in ("policy", "value")}
    trained = train_adapters(model, specs)
    optimizer = torch.optim.Adam([p for one in trained.values() for p in one], lr=1e-2)
    x = torch.randn(32, 4)
    for _ in range(40):
        with torch.no_grad():
            logits, values, reference = forward_each(model, ["policy", "value", None], x)
            actions = torch.distributions.Categorical(logits=logits).sample()[:, None]
            old, ref = (one.log_softmax(-1).gather(1, actions) for one in (logits, reference))
            mask = torch.ones(32, 1, dtype=torch.bool)
            penalty = kl_penalty(old, ref, "jensen_shannon")
            rewards = token_rewards(REWARDS[actions[:, 0]], penalty, mask, beta)
            rollout = Rollout(old, values[:, :1], rewards - values[:, :1], rewards, mask)
        for _ in range(2):
            optimizer.zero_grad()
            logits, values = forward_each(model, ["policy", "value"], x)
            ppo_loss(logits.log_softmax(-1).gather(1, actions), values[:, :1], rollout).backward()
            optimizer.step()
    with torch.no_grad():
        policy, reference = (one.log_softmax(-1) for one in forward_each(model, ["policy", None], x))
    gain = ((policy.exp() - reference.exp()) @ REWARDS).mean()
    kl = (policy.exp() * (policy - reference)).sum(-1).mean()
    moved = max(float((a - b).abs().max()) for a, b in zip(before, base, strict=True))
    return float(gain), float(kl), moved
