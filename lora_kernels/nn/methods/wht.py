"""LBP-WHT: a linear whose backward pass is of low rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import derived_buffers, keep_derived
from ...ops.walsh import WalshGrid, walsh, walsh_linear
from ..adapter_layer import shared_state


class WHTLinear(nn.Linear):
    """y = x Wᵀ + b, exactly; its gradients through the low Walsh frequencies of 8 × 8 patches of tokens

    LBP-WHT (Yang et al., 2023, arXiv 2309.15275), from its mathematics: see
    :func:`lora_kernels.ops.walsh.walsh_linear`. Of x only n (n + 1)/2 projections a patch are saved, 36 of 64
    by default, and the products of the backward pass are as much smaller; with all of them, ``lowpass`` = 15,
    and a grid of whole patches the gradients are exact. At a grid that is not, tokens at the edges are
    mirrored, in x and in dY.

    An ``nn.Linear``, the same ``weight`` and ``bias``, which train as they did. x is ``[..., tokens, in]``:
    the last height · width tokens are the grid's, by rows; what leads them (a class token) is exact.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        grid: height and width.
        order: side of a patch, a power of two.
        lowpass: n; masks (r, c) with r + c < n are kept.
        bias: whether there is a b.
        device: of W and b.
        dtype: of W and b.

    Raises:
        ValueError: an option out of range, a side of the grid too short to mirror, or x with too few tokens.
    """

    grid: WalshGrid
    basis: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: tuple[int, int],
        order: int = 8,
        lowpass: int = 8,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checked = _checked(grid, order, lowpass)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._take(checked)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, grid: tuple[int, int], order: int = 8, lowpass: int = 8
    ) -> WHTLinear:
        """One on the very parameters of ``linear``, a plain ``nn.Linear``."""
        checked = _checked(grid, order, lowpass)
        layer = cls.__new__(cls)
        layer.__dict__.update(shared_state(linear, nn.Linear))
        layer._take(checked)
        return layer

    def _take(self, grid: WalshGrid) -> None:
        self.grid = grid
        rows = walsh(grid.order)[: grid.side].to(self.weight)
        self.register_buffer("basis", rows, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of any module; the basis goes through ``meta`` and ``to_empty`` unharmed."""
        derived = derived_buffers(self)
        super()._apply(fn, recurse)
        keep_derived(self, derived)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., tokens, in_features]``."""
        if x.dim() < 2 or x.shape[-2] < self.grid.tokens:
            height, width, *_ = self.grid
            raise ValueError(
                f"x: expected at least {height} · {width} tokens in its last dimension but one, got shape"
                f" {tuple(x.shape)}"
            )
        return walsh_linear(x, self.weight, self.bias, self.grid, self.basis)

    def extra_repr(self) -> str:
        """The linear's, and the grid."""
        return f"{super().extra_repr()}, {', '.join(f'{k}={v}' for k, v in self.grid._asdict().items())}"


def _checked(grid: Any, order: Any, lowpass: Any) -> WalshGrid:
    if not isinstance(order, int) or order < 1 or order & (order - 1):
        raise ValueError(f"order: expected a power of two, got {order!r}")
    if not isinstance(lowpass, int) or not 1 <= lowpass <= 2 * order - 1:
        raise ValueError(f"lowpass: expected 1 to 2 · order - 1 = {2 * order - 1}, got {lowpass!r}")
    sides = tuple(grid) if isinstance(grid, (list, tuple)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"grid: expected a height and a width, got {grid!r}")
    for side in sides:
        if -(-(-side % order) // 2) >= side:
            raise ValueError(
                f"grid: expected sides that can be mirrored to a multiple of {order}, got {side}"
            )
    return WalshGrid(*sides, order, lowpass)
