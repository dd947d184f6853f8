"""y = x Wᵀ + b + s · ((drop(x_lora) Aᵀ) ⊙ g) Bᵀ in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import dropout_apply, dropout_mask


def composite(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    x_lora: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The equation, op by op, with autograd's own derivative: the oracle. x is [M,K]."""
    branch = x if x_lora is None else x_lora
    branch = branch if mask is None else dropout_apply(branch, mask, dropout_p)
    h = branch @ lora_a.to(x.dtype).T
    h = h if gate is None else h * gate.to(x.dtype)
    delta = (h @ lora_b.to(x.dtype).T) * scaling
    base = torch.zeros_like(delta) if weight is None else F.linear(x, weight)
    return base + delta if bias is None else base + bias + delta


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    x_lora: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    branch = x if x_lora is None else x_lora
    mask = x.new_empty(0, dtype=torch.uint8)
    if seed is not None:
        mask = dropout_mask(seed, x.shape[0], x.shape[1], dropout_p)
        branch = dropout_apply(branch, mask, dropout_p)
    h = branch @ lora_a.to(x.dtype).T
    gated = h if gate is None else h * gate.to(x.dtype)
    b_t = lora_b.to(x.dtype).T
    if weight is None:
        y = torch.mm(gated, b_t).mul_(scaling)
        return (y if bias is None else y.add_(bias)), h, mask
    return F.linear(x, weight, bias).addmm_(gated, b_t, alpha=scaling), h, mask


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    separate: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
    u = (dy @ b) * scaling
    dh = u if gate is None else u * gate.to(dy.dtype)
    db = _grad_b(dy, h, gate, scaling).to(lora_b.dtype) if needs[2] else None
    dgate = grad_gate(u, h, gate) if needs[3] else None
    branch = _grad_branch(dh, a, mask, dropout_p) if needs[0] or needs[4] else None
    da = _grad_a(dh, x, mask, dropout_p).to(lora_a.dtype) if needs[1] else None
    dx = grad_x(dy, weight, None if separate else branch, lora_a.shape[1]) if needs[0] else None
    grads = (dx, da, db, dgate, branch)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _grad_b(dy: Tensor, h: Tensor, gate: Tensor | None, scaling: float) -> Tensor:
    gated = h if gate is None else h * gate.to(h.dtype)
    return (dy.T @ gated) * scaling


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
