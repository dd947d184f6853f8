"""A linear whose weight is made of W and small factors at each call, and kept by nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from ._inputs import autocasts, cast, compute_dtype
from ._lora_function import output_like, rows_of


class Former(Protocol):
    """What makes W' of W: a hashable tuple of numbers, and two functions."""

    @property
    def form(self) -> Callable[..., tuple[Tensor, Any]]:
        """(weight, *tensors): W' ``[out, in]``, without a weight what would be added to it; and what
        ``gradients`` reads beside.
        """

    @property
    def gradients(self) -> Callable[..., Sequence[Tensor | None]]:
        """(grad, needs, made, *tensors): those of the tensors, by ``needs``, for W' 's gradient."""


class HadamardProduct(NamedTuple):
    """W + s · (B₁ A₁) ⊙ (B₂ A₂) of tensors B₁, A₁, B₂, A₂ (FedPara, LoHa)"""

    scaling: float

    def form(self, weight: Tensor | None, *factors: Tensor) -> tuple[Tensor, Any]:
        """W', and both products."""
        b1, a1, b2, a2 = factors
        one, two = b1 @ a1, b2 @ a2
        if weight is None:
            return (one * two).mul_(self.scaling), (one, two)
        return torch.addcmul(weight, one, two, value=self.scaling), (one, two)

    def gradients(self, grad: Tensor, needs: Sequence[bool], made: Any, *factors: Tensor) -> list[Any]:
        """Of the four factors."""
        b1, a1, b2, a2 = factors
        one, two = made
        first = _of_product(grad * two, b1, a1, needs[:2], self.scaling)
        return first + _of_product(grad * one, b2, a2, needs[2:], self.scaling)


class HadamardUpdate(NamedTuple):
    """W + W₀ ⊙ (B A) of tensors B, A, W₀ (HiRA)"""

    def form(self, weight: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Any]:
        """W', and B A."""
        lora_b, lora_a, base = tensors
        product = lora_b @ lora_a
        return (base * product if weight is None else torch.addcmul(weight, base, product)), product

    def gradients(self, grad: Tensor, needs: Sequence[bool], made: Any, *tensors: Tensor) -> list[Any]:
        """Of B, A and W₀."""
        lora_b, lora_a, base = tensors
        factors = _of_product(grad * base, lora_b, lora_a, needs[:2], 1.0)
        return [*factors, grad * made if needs[2] else None]


class ScaledShifted(NamedTuple):
    """W + W₀ ⊙ P + Q of tensors W₀, then P's and Q's (GLoRA)

    Each of the two is a product of factors ``[out, r]`` and ``[r, in]``, or a tensor that spreads over W.
    """

    def form(self, weight: Tensor | None, base: Tensor, *paths: Tensor) -> tuple[Tensor, Any]:
        """W', and P."""
        of_p, of_q = _halves(paths)
        scale = of_p[0] if len(of_p) == 1 else of_p[0] @ of_p[1]
        formed = base * scale if weight is None else torch.addcmul(weight, base, scale)
        return formed.add_(of_q[0]) if len(of_q) == 1 else formed.addmm_(*of_q), scale

    def gradients(self, grad: Tensor, needs: Sequence[bool], made: Any, *tensors: Tensor) -> list[Any]:
        """Of W₀ and both paths."""
        base, *paths = tensors
        (of_p, of_q), (needs_p, needs_q) = _halves(paths), _halves(needs[1:])
        scales = _of_path(grad * base, of_p, needs_p) if any(needs_p) else [None] * len(of_p)
        return [grad * made if needs[0] else None, *scales, *_of_path(grad, of_q, needs_q)]


def _halves(both: Sequence[Any]) -> tuple[Any, Any]:
    middle = len(both) // 2
    return both[:middle], both[middle:]


def _of_path(grad: Tensor, path: Sequence[Tensor], needs: Sequence[bool]) -> list[Any]:
    if len(path) == 2:
        return _of_product(grad, path[0], path[1], needs, 1.0)
    return [grad.sum_to_size(path[0].shape) if needs[0] else None]


def _of_product(
    grad: Tensor, lora_b: Tensor, lora_a: Tensor, needs: Sequence[bool], scaling: float
) -> list[Any]:
    """Of s · B A: the scale goes on what is small."""
    d_b = (grad @ lora_a.T).mul_(scaling) if needs[0] else None
    return [d_b, (lora_b.T @ grad).mul_(scaling) if needs[1] else None]


def formed_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, former: Former, tensors: Sequence[Tensor]
) -> Tensor:
    """y = x W'ᵀ + b, W' made of W by ``former``; with no weight x ΔWᵀ alone

    One product forward and one to x. Of x, W and the tensors the call keeps no more than these: the backward
    pass makes W' anew.

    Args:
        x: ``[..., in]``.
        weight: W ``[out, in]``, or ``None``.
        bias: b ``[out]``, or ``None``.
        former: what makes W', see :class:`Former`.
        tensors: what it makes it with, cast to the dtype of x.
    """
    if autocasts(x):
        x = x.to(compute_dtype(x))
    same = weight
    weight, bias = cast(weight, x.dtype), cast(bias, x.dtype)
    # A view, since torch.compile takes no tensor twice.
    tensors = [weight[:] if t is same and weight is not None else t.to(x.dtype) for t in tensors]
    if _dispatch.transformed():
        return F.linear(x, former.form(weight, *tensors)[0], bias)
    y: Tensor = _FormedLinear.apply(former, x, weight, bias, *tensors)
    return y


class _FormedLinear(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:  # see _BranchedLinear's
        former, x, weight, bias, *tensors = given
        ctx.former = former
        _, _, needs_weight, _, *needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight or any(needs) else None, weight, *tensors)
        formed, _ = former.form(weight, *tensors)
        return output_like(F.linear(rows_of(x), formed, bias), x)  # type: ignore[arg-type]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, *tensors = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad
        rows: Any = rows_of(dy)
        formed, made = ctx.former.form(weight, *tensors)
        dx = (rows @ formed).view(*dy.shape[:-1], formed.shape[1]) if needs_x else None
        del formed
        grad = None if x is None else rows.T @ rows_of(x)
        grads = ctx.former.gradients(grad, needs, made, *tensors) if any(needs) else [None] * len(needs)
        return None, dx, grad if needs_weight else None, rows.sum(0) if needs_bias else None, *grads
