"""AdvLoRA's loss: samples, and the worst ones near them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..optim._common import check_number
from ._attack import ascend


def advlora_loss(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    clean: float = 0.5,
    radius: float = 8 / 255,
    step: float = 2 / 255,
    steps: int = 3,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    start: float = 1e-3,
) -> Tensor:
    """c · L(x) + (1-c) · L(x + δ), δ by K steps δ ← Π(δ + η sign ∇_δ L(x + δ)) with ‖δ‖∞ ≤ ε

    AdvLoRA (Ji et al., 2024, arXiv 2404.13425) as rebuilt from its abstract: the adapters learn under the
    attack that is worst for them. What trains gets gradients by the backward pass of this loss alone, not by
    the search for δ.

    Args:
        loss: L of an input, such as ``lambda x: F.cross_entropy(model(x), labels)``.
        x: the samples, of a floating dtype.
        clean: c in [0, 1]; 0 is the objective min max L(x + δ) by itself.
        radius: ε.
        step: η.
        steps: K.
        bounds: least and largest value of an input, or ``None``.
        start: size of the random δ to start from.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range.

    Examples:
        >>> model, x, labels = nn.Linear(4, 2), torch.rand(3, 4), torch.tensor([0, 1, 1])
        >>> advlora_loss(lambda x: nn.functional.cross_entropy(model(x), labels), x).backward()
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    check_number("clean", clean)
    if clean > 1:
        raise ValueError(f"clean: expected at most 1, got {clean}")
    attacked = ascend(loss, x, radius=radius, step=step, steps=steps, bounds=bounds, start=start)
    hard = loss(attacked)
    return clean * loss(x) + (1 - clean) * hard if clean else hard
