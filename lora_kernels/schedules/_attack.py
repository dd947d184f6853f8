"""The worst input near a given one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..optim._common import check_count, check_number


def ascend(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    radius: float,
    step: float,
    steps: int,
    bounds: tuple[float, float] | None,
    start: float,
) -> Tensor:
    """x' ← clip(x' + η sign ∇ L(x')), K times, into the ball |x' - x| ≤ ``radius`` and into ``bounds``

    From x + ``start`` · normal numbers. Nothing but x' gets a gradient.
    """
    for name, number in (("radius", radius), ("step", step), ("start", start)):
        check_number(name, number)
    check_count("steps", steps)
    attacked = x.detach() + start * torch.randn_like(x)
    for _ in range(steps):
        attacked.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(attacked), attacked)
        moved = attacked.detach() + step * grad.sign()
        attacked = torch.min(torch.max(moved, x.detach() - radius), x.detach() + radius)
        attacked = attacked if bounds is None else attacked.clamp(*bounds)
    return attacked.detach()
