"""y = x Wᵀ + b + (c - 1) ⊙ (drop(x) Wᵀ) + c ⊙ (s (drop(x) Aᵀ) Bᵀ) in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import DoraBackward, DoraInputs, LoraBackward, flat
from .dropout import dropout_apply, dropout_mask
from .lora_linear import lora_linear_backward


def composite(inputs: DoraInputs, mask: Tensor | None = None) -> Tensor:
    """PEFT's formula, op by op, with autograd's own derivative: the oracle. c is ``scale``; x is [M,K]."""
    x, weight, lora_a, lora_b, scale, bias, *_ = inputs
    c = scale.to(x.dtype)
    base = F.linear(x, weight)
    branch = x if mask is None else dropout_apply(x, mask, inputs.dropout_p)
    low = base if mask is None else F.linear(branch, weight)
    delta = branch @ lora_a.to(x.dtype).T @ lora_b.to(x.dtype).T
    y = base + (c - 1) * low + c * delta * inputs.scaling
    return y if bias is None else y + bias


@flat(DoraInputs)
def dora_linear(inputs: DoraInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, z, h and the packed keep bits."""
    x, weight, lora_a, lora_b, scale, bias, seed, scaling, dropout_p, keep_z = inputs
    branch, mask = x, x.new_empty(0, dtype=torch.uint8)
    if seed is not None:
        mask = dropout_mask(seed, x.shape[0], x.shape[1], dropout_p)
        branch = dropout_apply(x, mask, dropout_p)
    h = branch @ lora_a.to(x.dtype).T
    z = F.linear(branch, weight).addmm_(h, lora_b.to(x.dtype).T, alpha=scaling)
    y = (z * scale if bias is None else torch.addcmul(bias, z, scale.to(x.dtype))).to(x.dtype)
    if seed is not None:
        y.addmm_(x - branch, weight.T)
    return y, z if keep_z else z.new_empty(0, z.shape[1]), h, mask


@flat(DoraBackward)
def dora_linear_backward(saved: DoraBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    dy, x, weight, lora_a, lora_b, scale, z, h, mask, scaling, dropout_p, needs = saved
    dz = (dy * scale).to(dy.dtype)
    base = weight if mask is None else None
    branch_needs = (*needs[:3], False, False)
    branch = LoraBackward(dz, x, base, lora_a, lora_b, h, None, mask, scaling, dropout_p, False, branch_needs)
    grads = lora_linear_backward(*branch)
    if needs[0] and mask is not None:
        grads[0] += dropout_apply((dz - dy) @ weight, mask, dropout_p)
        grads[0].addmm_(dy, weight)
    if needs[3]:
        grads.append((dy.to(scale.dtype) * z).sum(0).to(scale.dtype))
    return grads
