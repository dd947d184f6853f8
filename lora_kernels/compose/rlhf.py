"""PPO with one base for the policy, the value model and the reference: penalties, losses, advantages.

The models are adapters: ``forward_each(model, ["policy", "value", None], …)`` is one pass of all three.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PENALTIES = ("kl", "clamped_kl", "bregman", "squared_error", "jensen_shannon")


def kl_penalty(logprobs: Tensor, reference: Tensor, kind: str = "kl") -> Tensor:
    """By token, with l = log p and l_r that of the reference, one of

    ``kl``: l − l_r; ``clamped_kl``: max(l − l_r, 0); ``bregman``: e^(l_r − l) − 1 + (l − l_r), at least 0;
    ``squared_error``: (l − l_r)²/2; ``jensen_shannon``: ½ max(l − l_m, 0) + ½ max(l_r − l_m, 0) with
    l_m = log((e^l + e^l_r)/2), from 0 to ½ log 2.

    Sun et al., 2023 (arXiv 2309.09055), who find the last one best.

    Args:
        logprobs: l of the tokens, any shape.
        reference: l_r, of the same shape.
        kind: which.

    Raises:
        ValueError: another kind, or shapes that differ.

    Examples:
        >>> kl_penalty(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
        tensor([[0.5000]])
    """
    if kind not in PENALTIES:
        raise ValueError(f"kind: expected one of {', '.join(PENALTIES)}, got {kind!r}")
    _same_shape("reference", reference, logprobs)
    ratio = logprobs - reference
    if kind == "kl":
        return ratio
    if kind == "clamped_kl":
        return ratio.clamp(min=0)
    if kind == "bregman":
        return torch.expm1(-ratio) + ratio
    if kind == "squared_error":
        return ratio.square() / 2
    # l - l_m from the ratio alone, so that it is zero where the ratio is.
    zero = torch.zeros_like(ratio)
    above = [(math.log(2) - torch.logaddexp(zero, one)).clamp(min=0) for one in (-ratio, ratio)]
    return (above[0] + above[1]) / 2


def token_rewards(scores: Tensor, penalty: Tensor, mask: Tensor, beta: float = 0.02) -> Tensor:
    """r_t = −β penalty_t, and the score added at the last token of the mask; 0 outside of it

    Args:
        scores: ``[samples]``, of the reward model.
        penalty: ``[samples, tokens]``.
        mask: ``[samples, tokens]``, true at the response's tokens.
        beta: β.

    Raises:
        ValueError: shapes that do not fit, or a sample without any token.

    Examples:
        >>> penalty, mask = torch.tensor([[0.0, 5.0]]), torch.tensor([[True, True]])
        >>> token_rewards(torch.tensor([1.0]), penalty, mask, beta=0.1)
        tensor([[0.0000, 0.5000]])
    """
    _same_shape("mask", mask, penalty)
    if scores.shape != penalty.shape[:1]:
        raise ValueError(f"scores: expected shape {tuple(penalty.shape[:1])}, got {tuple(scores.shape)}")
    mask = mask.bool()
    if not bool(mask.any(1).all()):
        raise ValueError("mask: expected at least one token in each sample, got one without")
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).argmax(1)
    rewards = torch.where(mask, -beta * penalty, 0.0)
    return rewards + scores[:, None] * (places == last[:, None])


def gae(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γ λ A_{t+1},  δ_t = r_t + γ V_{t+1} − V_t: advantages, and returns A + V

    Schulman et al., 2016 (arXiv 1506.02438).

    Args:
        rewards: ``[samples, tokens]``.
        values: V, the same; what comes after the last is 0.
        gamma: γ.
        lam: λ.

    Examples:
        >>> advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), lam=1.0)
        >>> advantages
        tensor([[1., 1.]])
    """
    _same_shape("values", values, rewards)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    errors = rewards + gamma * after - values
    found, advantage = [], torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        advantage = errors[:, step] + gamma * lam * advantage
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor, *, shift: bool = True) -> Tensor:
    """(v − μ)/√(σ² + 1e-8) over the mask, or with μ added again where ``shift`` is false.

    Examples:
        >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])).shape
        torch.Size([1, 3])
    """
    _same_shape("mask", mask, values)
    mean = _mean(values, mask)
    variance = _mean((values - mean).square(), mask)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift else white + mean


class Rollout(NamedTuple):
    """What was sampled, without gradients; each ``[samples, tokens]``."""

    # log p of the sampled tokens under the policy that sampled them, and V of the value model then.
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    # True at the response's tokens.
    mask: Tensor


def ppo_loss(
    logprobs: Tensor,
    values: Tensor,
    rollout: Rollout,
    clip: float = 0.2,
    value_clip: float = 0.2,
    vf_coef: float = 0.1,
) -> Tensor:
    """mean max(−A ρ, −A clip(ρ, 1 ± ε)) + c ½ mean max((V − R)², (V_clipped − R)²),  ρ = e^(l − l_old)

    PPO (Schulman et al., 2017, arXiv 1707.06347), V_clipped being V within ± ``value_clip`` of the rollout's.
    The means are over the mask.

    Args:
        logprobs: l of the tokens now, with gradients.
        values: V now, with gradients.
        rollout: what was sampled.
        clip: ε.
        value_clip: of V.
        vf_coef: c.

    Raises:
        ValueError: shapes that differ.

    Examples:
        >>> logprobs, values, mask = torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
        >>> rollout = Rollout(logprobs, values, torch.randn(2, 3), torch.randn(2, 3), mask)
        >>> loss = ppo_loss(logprobs.requires_grad_(), values.requires_grad_(), rollout)
    """
    for name, tensor in (("values", values), *rollout._asdict().items()):
        _same_shape(name, tensor, logprobs)
    ratio = torch.exp(logprobs - rollout.logprobs)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    policy = torch.maximum(-rollout.advantages * ratio, -rollout.advantages * clipped)
    near = values.clamp(rollout.values - value_clip, rollout.values + value_clip)
    errors = torch.maximum((values - rollout.returns).square(), (near - rollout.returns).square())
    return _mean(policy, rollout.mask) + vf_coef / 2 * _mean(errors, rollout.mask)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), values, 0.0).sum() / mask.sum().clamp(min=1)


def _same_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
