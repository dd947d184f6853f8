"""y = x Wᵀ + b + s · ((drop(x_lora) Aᵀ) ⊙ g) Bᵀ in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import LoraBackward, LoraInputs, flat
from .dropout import dropout_apply, dropout_mask


def composite(inputs: LoraInputs, mask: Tensor | None = None) -> Tensor:
    """The equation, op by op, with autograd's own derivative: the oracle. x is [M,K]."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    branch = inputs.branch if mask is None else dropout_apply(inputs.branch, mask, inputs.dropout_p)
    h = _gated(branch @ inputs.lora_a.to(x.dtype).T, inputs.gate)
    delta = (h @ inputs.lora_b.to(x.dtype).T) * inputs.scaling
    base = torch.zeros_like(delta) if weight is None else F.linear(x, weight)
    return base + delta if bias is None else base + bias + delta


@flat(LoraInputs)
def lora_linear(inputs: LoraInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    x, weight, bias, branch = inputs.x, inputs.weight, inputs.bias, inputs.branch
    mask = x.new_empty(0, dtype=torch.uint8)
    if inputs.seed is not None:
        mask = dropout_mask(inputs.seed, branch.shape[0], branch.shape[1], inputs.dropout_p)
        branch = dropout_apply(branch, mask, inputs.dropout_p)
    h = branch @ inputs.lora_a.to(x.dtype).T
    gated, b_t = _gated(h, inputs.gate), inputs.lora_b.to(x.dtype).T
    if weight is None:
        y = torch.mm(gated, b_t).mul_(inputs.scaling)
        return (y if bias is None else y.add_(bias)), h, mask
    return F.linear(x, weight, bias).addmm_(gated, b_t, alpha=inputs.scaling), h, mask


def _gated(h: Tensor, gate: Tensor | None) -> Tensor:
    return h if gate is None else h * gate.to(h.dtype)


@flat(LoraBackward)
def lora_linear_backward(saved: LoraBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    dy, mask, p, needs = saved.dy, saved.mask, saved.dropout_p, saved.needs
    a, b = saved.lora_a.to(dy.dtype), saved.lora_b.to(dy.dtype)
    u = (dy @ b) * saved.scaling
    dh = _gated(u, saved.gate)
    db = (dy.T @ _gated(saved.h, saved.gate) * saved.scaling).to(saved.lora_b.dtype) if needs[2] else None
    dgate = grad_gate(u, saved.h, saved.gate) if needs[3] else None
    branch = _grad_branch(dh, a, mask, p) if needs[0] or needs[4] else None
    da = _grad_a(dh, saved.x, mask, p).to(saved.lora_a.dtype) if needs[1] else None
    dx = grad_x(dy, saved.weight, None if saved.separate else branch, a.shape[1]) if needs[0] else None
    grads = (dx, da, db, dgate, branch)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def grad_gate(u: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """dg = U ⊙ h, summed over the rows where they share one gate."""
    grad = u * h
    return (grad.sum(0) if gate.dim() == 1 else grad).to(gate.dtype)


def _grad_branch(dh: Tensor, a: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    grad = dh @ a
    return grad if mask is None else dropout_apply(grad, mask, dropout_p)


def _grad_a(dh: Tensor, x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    branch = x if mask is None else dropout_apply(x, mask, dropout_p)
    return dh.T @ branch


def grad_x(dy: Tensor, weight: Tensor | None, branch: Tensor | None, cols: int) -> Tensor:
    """dX = dY W + the branch's gradient, whichever of the two there is."""
    if weight is None:
        return dy.new_zeros(dy.shape[0], cols) if branch is None else branch
    # Accumulating into the branch's gradient spares a third tensor and one pass over it.
    return dy @ weight if branch is None else branch.addmm_(dy, weight)
