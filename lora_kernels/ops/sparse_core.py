"""A linear of two bases with a diagonal and a sparse matrix between them: FRoD's."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from ._inputs import autocasts, compute_dtype
from ._lora_function import output_like, rows_of


class Places(NamedTuple):
    """Where a square sparse matrix has its values: by rows, and those of its transpose by rows."""

    # [2, nnz], ascending, and where in the values given each of them is.
    at: Tensor
    order: Tensor
    # Of the transpose: the same, of the values by `at`.
    at_transposed: Tensor
    order_transposed: Tensor
    # Where each row begins [n + 1].
    begins: Tensor


@torch.inference_mode(False)  # what is kept serves training too
def places(indices: Tensor, size: int) -> Places:
    """What :func:`sparse_core` reads of where the values are, to be made once.

    Args:
        indices: rows and columns ``[2, nnz]``, in any order, none twice.
        size: n.

    Examples:
        >>> places(torch.tensor([[1, 0], [0, 1]]), 2).order
        tensor([1, 0])
    """
    rows, columns = indices.to(torch.long).clone()
    order = (rows * size + columns).argsort()
    rows, columns = rows[order], columns[order]
    order_transposed = (columns * size + rows).argsort()
    transposed = torch.stack([columns, rows])[:, order_transposed]
    begins = F.pad(torch.bincount(rows, minlength=size).cumsum(0), (1, 0))
    return Places(torch.stack([rows, columns]), order, transposed, order_transposed, begins)


def sparse_core(
    x: Tensor, right: Tensor, left: Tensor, diagonal: Tensor, values: Tensor, where: Places
) -> Tensor:
    """y = x V (diag λ + S)ᵀ Uᵀ

    Two products forward and two backward, and the sparse ones in S's own size, its gradient among them: no
    ``[n, n]`` is made, except in half precision, which no sparse product knows on every device, and where
    ``torch.compile`` or ``torch.func`` trace it. V and U are constants. x V ``[rows, n]`` is saved, x is not.

    Args:
        x: ``[..., in]``.
        right: V ``[in, n]``.
        left: U ``[out, n]``.
        diagonal: λ ``[n]``.
        values: S's ``[nnz]``.
        where: their places, of :func:`places`.

    Raises:
        ValueError: the sizes of V, U, λ and S do not fit each other or x.

    Examples:
        >>> x, right, left = torch.randn(3, 4), torch.randn(4, 2), torch.randn(5, 2)
        >>> where = places(torch.tensor([[1], [0]]), 2)
        >>> sparse_core(x, right, left, torch.ones(2), torch.ones(1), where).shape
        torch.Size([3, 5])
    """
    n = right.shape[1]
    wanted = {"right": (x.shape[-1], n), "left": (left.shape[0], n), "diagonal": (n,)}
    given = {"right": right, "left": left, "diagonal": diagonal, "values": values}
    for name, shape in {**wanted, "values": where.order.shape}.items():
        if given[name].shape != shape:
            raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(given[name].shape)}")
    if autocasts(x):
        x = x.to(compute_dtype(x))
    right, left, diagonal, values = (t.to(x.dtype) for t in (right, left, diagonal, values))
    if _dispatch.transformed() or torch.compiler.is_compiling() or not _is_sparse(x):
        return _dense(x, right, left, diagonal, values, where)
    return _SparseCore.apply(x, right, left, diagonal, values, where)  # type: ignore[no-any-return]


def _is_sparse(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64) and x.numel() > 0


def _dense(x: Tensor, right: Tensor, left: Tensor, diagonal: Tensor, values: Tensor, where: Places) -> Tensor:
    core = torch.diag(diagonal).index_put(tuple(where.at), values[where.order], accumulate=True)
    return x @ right @ core.T @ left.T


class _SparseCore(torch.autograd.Function):
    """All of the middle is transposed, since sparse products take the sparse matrix first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        right, left, diagonal, values, where = given
        z = right.T @ rows_of(x).T  # type: ignore[union-attr]
        ordered = values[where.order]
        ctx.where = where
        ctx.save_for_backward(right, left, diagonal, ordered, z)
        middle = _sparse_product(where.at, ordered, z).addcmul_(z, diagonal[:, None])
        return output_like(middle.T @ left.T, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        right, left, diagonal, ordered, z = ctx.saved_tensors
        needs_x, _, _, needs_diagonal, needs_values, _ = ctx.needs_input_grad
        where, grad = ctx.where, left.T @ rows_of(dy).T  # type: ignore[union-attr]
        d_diagonal = (grad * z).sum(1) if needs_diagonal else None
        d_values = None
        if needs_values:
            d_values = torch.empty_like(ordered).index_copy_(0, where.order, _at_places(where, grad, z))
        dx = None
        if needs_x:
            transposed = _sparse_product(where.at_transposed, ordered[where.order_transposed], grad)
            dx = (transposed.addcmul_(grad, diagonal[:, None]).T @ right.T).view(
                *dy.shape[:-1], right.shape[0]
            )
        return dx, None, None, d_diagonal, d_values, None


def _sparse_product(at: Tensor, values: Tensor, z: Tensor) -> Tensor:
    """S z, of places in order."""
    size = (len(z), len(z))
    sparse = torch.sparse_coo_tensor(at, values, size, is_coalesced=True, check_invariants=False)
    return torch.sparse.mm(sparse, z)


def _at_places(where: Places, grad: Tensor, z: Tensor) -> Tensor:
    """What grad zᵀ is where S has its values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)
        blank = torch.sparse_csr_tensor(
            where.begins,
            where.at[1],
            grad.new_zeros(len(where.order)),
            (len(z), len(z)),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(blank, grad, z.T, beta=0.0).values()
