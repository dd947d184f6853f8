"""LoRA-FA's optimiser: A frozen, and the gradient of B that is closest to W's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.pairs import Pair
from ._common import adamw_, alike, check_adamw, evaluate, grams, pairs_of, trainable

_DAMPING = 1e-8


class LoRAFA(Optimizer):
    """g_B ← g_B (A Aᵀ + 10⁻⁸ I)⁺ / s², then AdamW; A stays as it is

    LoRA-FA (Zhang et al., 2023, arXiv 2308.03303), with PEFT's projection: s · g_B A is then what of W's
    gradient lies in the rows of A. Freezes every A that it projects by; with that a layer keeps h = x Aᵀ
    and not x for its backward pass. Embeddings and all else that trains get AdamW alone. ε stands beside √v,
    and the decay of weights comes after the step, as in PEFT.

    Args:
        model: one of :func:`apply_lora` or of PEFT. What trains in it now is optimised.
        lr: learning rate.
        betas: of both moments.
        eps: ε.
        weight_decay: λ.
        correct_bias: whether the moments are corrected for their start at zero.

    Raises:
        TypeError: ``model`` is not a module, or a number is none.
        ValueError: no layer has a B that trains, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
    ) -> None:
        check_adamw(lr, betas, eps, weight_decay)
        pairs = [pair for pair in pairs_of(model) if pair.lora_b.requires_grad and not pair.is_embedding]
        if not pairs:
            raise ValueError("model: expected layers whose B trains, got none")
        frozen = [pair.lora_a for pair in pairs]
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(trainable(model, frozen), {**options, "correct_bias": correct_bias})
        self._pairs = {id(pair.lora_b): pair for pair in pairs}
        for lora_a in frozen:
            lora_a.requires_grad_(False)
            lora_a.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what ``closure`` gives."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            projected = [i for i, p in enumerate(params) if id(p) in self._pairs]
            pairs = [self._pairs[id(params[i])] for i in projected]
            for i, grad in zip(projected, _project([grads[i] for i in projected], pairs), strict=True):
                grads[i] = grad
            adamw_(params, grads, [self.state[p] for p in params], group)
        return loss


def _project(grads: list[Tensor], pairs: list[Pair]) -> list[Tensor]:
    """g (A Aᵀ + 10⁻⁸ I)⁺ / s² of each gradient, in its dtype and shape."""
    factors = [pair.lora_a.flatten(1) for pair in pairs]
    projected = list(grads)
    for places in alike(factors, [factor.shape[0] for factor in factors]):
        damped = grams([factors[i] for i in places])
        damped.diagonal(dim1=-2, dim2=-1).add_(_DAMPING)
        scales = damped.new_tensor([pairs[i].scaling ** -2 for i in places])
        # A direction that float32 cannot tell from zero is one that g has nothing in but rounding.
        cut = damped.shape[-1] * torch.finfo(torch.float32).eps
        found = torch.linalg.pinv(damped, rtol=cut, hermitian=True) * scales[:, None, None]
        wide = torch.promote_types(factors[places[0]].dtype, torch.float32)
        for i, inverse in zip(places, found.to(wide).unbind(), strict=True):
            product = grads[i].flatten(1).to(wide) @ inverse
            projected[i] = product.to(grads[i].dtype).view_as(grads[i])
    return projected
