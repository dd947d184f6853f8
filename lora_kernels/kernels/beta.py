"""The *beta* strategy of ``lora_linear``: memory-bound passes around the vendor's GEMM.

Forward: one pass over the branch's input writes h, the keep bits and y₀ = b + s (h ⊙ g) Bᵀ; the
vendor's GEMM then accumulates x Wᵀ into y₀. Backward: one pass over dY gives U = s dY B and dB; one
pass over x writes dX₀ = keep ⊙ (dH A)/(1-p) and gives dA; the GEMM accumulates dY W into dX₀.
"""

from __future__ import annotations

from torch import Tensor

from .._arguments import LoraBackward, LoraInputs
from ..planner import Plan
from ..reference.lora_linear import grad_gate, grad_x
from .passes import branch_pass, dy_pass, x_pass


def forward(plan: Plan, inputs: LoraInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    x, weight, lora_a, lora_b, bias, gate, _, seed, scaling, dropout_p = inputs
    y = x.new_empty(x.shape[0], lora_b.shape[0])
    changes = plan.tile.get("forward")
    h, mask = branch_pass(inputs.branch, lora_a, seed, dropout_p, lora_b, bias, gate, scaling, y, changes)
    return (y if weight is None else y.addmm_(x, weight.T)), h, mask


def backward(plan: Plan, saved: LoraBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    needs_x, needs_a, _, _, needs_x_lora = saved.needs
    lora_a, separate = saved.lora_a, saved.separate
    dh, db, dgate = factor_grads(plan, saved)
    needs_branch = needs_x_lora or (needs_x and not separate)
    x = saved.x if needs_a else None
    branch, da = x_pass(x, dh, lora_a, saved.mask, saved.dropout_p, needs_branch, plan.tile.get("x"))
    base = None if separate else branch
    dx = grad_x(saved.dy, saved.weight, base, lora_a.shape[1]) if needs_x else None
    grads = (dx, da, db, dgate, branch)
    return [grad for grad, needed in zip(grads, saved.needs, strict=True) if needed]


def factor_grads(plan: Plan, saved: LoraBackward) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dH = U ⊙ g in dY's dtype, and dB and dg where ``needs`` asks for them."""
    _, _, needs_b, needs_gate, _ = saved.needs
    dy, lora_b, h, gate, scaling = saved.dy, saved.lora_b, saved.h, saved.gate, saved.scaling
    u, db = dy_pass(dy, lora_b, h if needs_b else None, gate, scaling, changes=plan.tile.get("dy"))
    dh = u if gate is None else (u * gate).to(dy.dtype)
    return dh, db, grad_gate(u, h, gate) if needs_gate else None
