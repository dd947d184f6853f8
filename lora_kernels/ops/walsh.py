"""A linear on a grid of tokens whose backward pass keeps the low Walsh frequencies of each patch alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._inputs import autocasts, cast, compute_dtype


class WalshGrid(NamedTuple):
    """Patches of ``order`` × ``order`` of a grid of tokens, and which masks of a patch are kept.

    Mask (r, c) is H[r] ⊗ H[c], H the Walsh matrix in the order of sign changes; kept are those with
    r + c < ``lowpass``. A grid that is not whole patches is mirrored at its edges.
    """

    height: int
    width: int
    order: int
    lowpass: int

    @property
    def tokens(self) -> int:
        """Of the grid."""
        return self.height * self.width

    @property
    def side(self) -> int:
        """How many rows of H any mask has."""
        return min(self.order, self.lowpass)

    @property
    def masks(self) -> tuple[list[int], list[int]]:
        """r and c of each mask."""
        kept = [(r, c) for r in range(self.side) for c in range(self.side) if r + c < self.lowpass]
        return [r for r, _ in kept], [c for _, c in kept]

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        """Σ_t m_k[t] x[p, t]: ``[batch, tokens, C]`` to ``[batch, patches, masks, C]``, one product a patch.

        Rows and then columns are fewer operations, but in products of a side each, which take longer.
        """
        batch, channels, order = x.shape[0], x.shape[-1], self.order
        (down, _), (across, _) = _padding(self.height, order), _padding(self.width, order)
        grid = x.reshape(batch, self.height, self.width, channels)
        if len(down) > self.height or len(across) > self.width:
            grid = grid[:, down][:, :, across]
        parted = grid.view(batch, len(down) // order, order, len(across) // order, order, channels)
        patches = parted.transpose(2, 3).reshape(-1, order * order, channels)
        masks = self._matrix(basis.to(x))
        projected = masks.expand(len(patches), -1, -1).bmm(patches)
        return projected.unflatten(0, (batch, parted.shape[1] * parted.shape[3]))

    def restore(self, projected: Tensor, basis: Tensor) -> Tensor:
        """Σ_k m_k[t] g[p, k], the transpose of :meth:`project` but for what the mirror adds."""
        batch, channels, order = projected.shape[0], projected.shape[-1], self.order
        (down, top), (across, left) = _padding(self.height, order), _padding(self.width, order)
        flat = projected.flatten(0, 1)
        patches = self._matrix(basis.to(projected)).T.expand(len(flat), -1, -1).bmm(flat)
        parted = patches.view(batch, len(down) // order, len(across) // order, order, order, channels)
        grid = parted.transpose(2, 3).reshape(batch, len(down), len(across), channels)
        inner = grid[:, top : top + self.height, left : left + self.width]
        return inner.reshape(batch, self.tokens, channels)

    def _matrix(self, basis: Tensor) -> Tensor:
        """[masks, order²] of ±1."""
        r, c = self.masks
        return (basis[r][:, :, None] * basis[c][:, None]).flatten(1)


def walsh(order: int) -> Tensor:
    """H ``[order, order]`` of ±1, row i with i sign changes; H Hᵀ = order · I."""
    rows = torch.ones(1, 1, dtype=torch.int8)
    while len(rows) < order:
        rows = torch.cat((torch.cat((rows, rows), 1), torch.cat((rows, -rows), 1)))
    return rows[(rows[:, 1:] != rows[:, :-1]).sum(1).argsort()]


def _padding(length: int, order: int) -> tuple[list[int], int]:
    """The indices that fill a side up to whole patches, mirrored, and how many come before it."""
    before = -(-(-length % order) // 2)
    after = -length % order - before
    inside = list(range(length))
    return [*inside[before:0:-1], *inside, *inside[-2 : -2 - after : -1]], before


def walsh_linear(x: Tensor, weight: Tensor, bias: Tensor | None, grid: WalshGrid, basis: Tensor) -> Tensor:
    """y = x Wᵀ + b, with gradients of x and W through the low Walsh frequencies of x and dY

    dW = Σ_{p,k} gs[p,k]ᵀ xs[p,k] and dX[p,t] = Σ_k m_k[t] (gs[p,k] W), xs[p,k] = Σ_t m_k[t] x[p,t] and
    gs = Σ_t m_k[t] dY[p,t] / order². db is exact, and so are the tokens that lead the grid.

    Args:
        x: ``[..., tokens, in]``, the last height · width tokens the grid's, by rows.
        weight: W ``[out, in]``.
        bias: b ``[out]``, or ``None``.
        grid: patches and masks.
        basis: the first ``grid.side`` rows of :func:`walsh`.
    """
    if autocasts(x):
        dtype = compute_dtype(x)
        x, weight, bias = (cast(t, dtype) for t in (x, weight, bias))
    return _WalshLinear.apply(x, weight, bias, grid, basis)


class _WalshLinear(torch.autograd.Function):
    """Saves xs, masks / order² of x, and the leading tokens; of a frozen W neither."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, grid: WalshGrid, basis: Tensor
    ) -> Tensor:
        ctx.grid, ctx.shape = grid, x.shape
        lead, body = _split(x, grid)
        kept = (lead, grid.project(body, basis)) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, basis, *kept)
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, basis, lead_x, projected = ctx.saved_tensors
        lead, body = _split(dy, ctx.grid)
        low = ctx.grid.project(body, basis) / ctx.grid.order**2
        dx = dweight = dbias = None
        leads = lead.shape[1] > 0
        if ctx.needs_input_grad[0]:
            dx = ctx.grid.restore(low @ weight, basis)
            dx = (torch.cat((lead @ weight, dx), 1) if leads else dx).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dweight = low.flatten(0, 2).T @ projected.flatten(0, 2)
            if leads:
                dweight.addmm_(lead.flatten(0, 1).T, lead_x.flatten(0, 1))
        if ctx.needs_input_grad[2]:
            dbias = dy.flatten(0, -2).sum(0)
        return dx, dweight, dbias, None, None


def _split(x: Tensor, grid: WalshGrid) -> tuple[Tensor, Tensor]:
    """The leading tokens, a copy that keeps nothing else, and the grid's: [batch, tokens, C] each."""
    rows = x.reshape(-1, *x.shape[-2:])
    lead = rows.shape[1] - grid.tokens
    return rows[:, :lead].clone(), rows[:, lead:]
