"""Riemannian preconditioning: the gradient of each factor in the metric of the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.pairs import Pair
from ._common import alike, build, check_number, check_optimizer_class, grams, pairs_of, trainable


def riemannian(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    reg: float = 1e-2,
    **options: Any,
) -> Optimizer:
    """g_A ← (BᵀB + δ I)⁻¹ g_A and g_B ← g_B (A Aᵀ + δ I)⁻¹, then a step of ``optimizer_cls``

    Riemannian Preconditioned LoRA (Zhang and Pilanci, 2024, arXiv 2402.02347). Both factors are taken as they
    are before the step; where a Gram matrix cannot be factored the gradient stays as it is. Linears, and the
    convolutions of :func:`apply_lora`, are preconditioned; all else that trains goes to ``optimizer_cls``
    unchanged. What returns is an ``optimizer_cls`` with hooks: its state dict is its own, and ``.grad`` is
    the gradient again after the step. torch's AdamW, Adam and SGD come in their fused form, unless
    ``options`` say otherwise.

    Args:
        model: one of :func:`apply_lora` or of PEFT.
        optimizer_cls: any class of optimisers whose step needs no closure.
        lr: learning rate.
        reg: δ, above 0.
        options: of ``optimizer_cls``.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer_cls`` no optimiser.
        ValueError: no layer has an A and a B that both train, ``reg`` is out of range, or a step is given a
            closure: it would compute the gradients anew.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> optimizer = riemannian(model, torch.optim.SGD, lr=0.1)
    """
    check_optimizer_class(optimizer_cls)
    check_number("lr", lr)
    check_number("reg", reg, above=True)
    pairs = [pair for pair in pairs_of(model) if _covered(pair)]
    if not pairs:
        raise ValueError("model: expected layers whose A and B both train, got none")
    optimizer = build(optimizer_cls, [{"params": trainable(model)}], {**options, "lr": lr})
    precondition = _Precondition(pairs, reg)
    optimizer.register_step_pre_hook(precondition.before)
    optimizer.register_step_post_hook(precondition.after)
    return optimizer


def _covered(pair: Pair) -> bool:
    flat = pair.lora_a.ndim == pair.lora_b.ndim == 2 and not pair.is_embedding
    return flat and pair.lora_a.requires_grad and pair.lora_b.requires_grad


class _Precondition:
    """Other gradients for the time of a step."""

    def __init__(self, pairs: list[Pair], reg: float) -> None:
        self.pairs, self.reg = pairs, reg
        self.given: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise ValueError("closure: expected None (it would compute the gradients anew), got one")
        of_a = [pair for pair in self.pairs if pair.lora_a.grad is not None]
        of_b = [pair for pair in self.pairs if pair.lora_b.grad is not None]
        factors = [pair.lora_b.T for pair in of_a] + [pair.lora_a for pair in of_b]
        inverses = _inverse_grams(factors, self.reg)
        self.given = [(one, one.grad) for one in (p.lora_a for p in of_a) if one.grad is not None]
        self.given += [(one, one.grad) for one in (p.lora_b for p in of_b) if one.grad is not None]
        for i, ((parameter, grad), inverse) in enumerate(zip(self.given, inverses, strict=True)):
            wide = grad.to(inverse.dtype)
            parameter.grad = (inverse @ wide if i < len(of_a) else wide @ inverse).to(grad.dtype)

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for parameter, grad in self.given:
            parameter.grad = grad
        self.given = []


def _inverse_grams(factors: list[Tensor], reg: float) -> list[Tensor]:
    """(F Fᵀ + δ I)⁻¹ of each F [r, n], or I where it has none, in at least float32."""
    inverses: list[Tensor] = [torch.empty(0)] * len(factors)
    for places in alike(factors, [factor.shape[0] for factor in factors]):
        damped = grams([factors[i] for i in places])
        damped.diagonal(dim1=-2, dim2=-1).add_(reg)
        root, failed = torch.linalg.cholesky_ex(damped)
        unit = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)
        found = torch.where((failed > 0)[:, None, None], unit, torch.cholesky_inverse(root))
        wide = torch.promote_types(factors[places[0]].dtype, torch.float32)
        for i, inverse in zip(places, found.to(wide).unbind(), strict=True):
            inverses[i] = inverse
    return inverses
