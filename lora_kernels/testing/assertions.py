"""The tolerance rule: no less exact than twice eager PyTorch's own error."""

from __future__ import annotations

import torch
from torch import Tensor


def error_of(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual − exact| in fp64; infinite where ``actual`` is not a number, so that no NaN passes.

    Examples:
        >>> error_of(torch.tensor([1.5, float("nan")]), torch.ones(2, dtype=torch.float64))
        tensor([0.5000,    inf], dtype=torch.float64)
    """
    difference = (actual.detach().double() - exact.detach().double()).abs()
    return torch.nan_to_num(difference, nan=torch.inf, posinf=torch.inf)


def _tiny(largest: float, dtype: torch.dtype, ulps: float) -> float:
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:  # no wider oracle: `exact` rounds as often as the rest
        return 32 * eps * (1 + largest)
    return ulps * (eps * max(1.0, largest) + 8 * torch.finfo(torch.float32).eps * (1 + largest))


def assert_close(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    name: str = "result",
    dtype: torch.dtype | None = None,
    ulps: float = 0.5,
) -> None:
    """max |actual − exact| ≤ 2 · max |eager − exact| + tiny

    ``exact`` is computed in fp64 from the same inputs, ``eager`` by plain PyTorch in the dtype under
    test; ``tiny`` is half a unit in the last place of the largest element, or of one (the order of the
    inputs), and a few roundings of an fp32 sum of such numbers, so that an eager result that is exact by
    luck fails nobody.

    Args:
        actual: what the code under test gave.
        eager: what plain PyTorch gives in the same dtype.
        exact: the same in fp64.
        name: what to call the tensor in the message.
        dtype: the dtype computed in, where it is not ``actual``'s (fp32 adapters on a half base).
        ulps: the units in the last place that ``tiny`` allows. Random shapes want more than the
            default: of few elements eager's worst error is a small sample of what it could be.

    Raises:
        AssertionError: the shape differs, or the error is above the bound; the message has the worst
            index and both errors there.

    Examples:
        >>> exact = torch.randn(8, dtype=torch.float64)
        >>> eager = exact.float()
        >>> assert_close(eager.clone(), eager, exact)
    """
    __tracebackhide__ = True
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if exact.numel() == 0:
        return
    errors, eager_errors = error_of(actual, exact), error_of(eager, exact)
    bound = 2 * eager_errors.max().item() + _tiny(
        exact.detach().abs().max().item(), dtype or actual.dtype, ulps
    )
    if errors.max().item() <= bound:
        return
    worst = int(errors.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), errors.shape))
    raise AssertionError(
        f"{name}: error {errors.flatten()[worst]:.3e} at {index} is above {bound:.3e}"
        f" (got {actual.flatten()[worst]:.6g}, exact {exact.flatten()[worst]:.6g},"
        f" eager's error there {eager_errors.flatten()[worst]:.3e}, at its worst {eager_errors.max():.3e})"
    )
