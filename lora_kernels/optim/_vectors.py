"""Singular and eigenvectors that cost less than the whole decomposition, and are as exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """σ² in falling order and the singular vectors of the shorter side as columns, of W ``[m, n]``

    Of float32 and narrower from the Gram matrix of that side in float64, all in float64: as exact as a
    decomposition of the matrix in its own dtype, and in less than half of its time.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    if matrix.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return s.square(), vh.T if tall else u
    values, vectors = torch.linalg.eigh(gram(matrix))
    return values.flip(0).clamp_(min=0), vectors.flip(1)


def gram(matrix: Tensor) -> Tensor:
    """WᵀW or W Wᵀ, whichever is smaller, in float64."""
    wide = matrix.double()
    return wide.T @ wide if wide.shape[0] >= wide.shape[1] else wide @ wide.T


def leading_eigenvectors(symmetric: Tensor, r: int) -> Tensor:
    """Those of the r largest eigenvalues of a positive semidefinite matrix, as columns ``[n, r]``."""
    return torch.linalg.eigh(symmetric).eigenvectors[:, -r:].flip(1)


def leading_vectors(matrix: Tensor, r: int, right: bool) -> Tensor:
    """The first r singular vectors: right ones as rows ``[r, in]``, or left ones as columns ``[out, r]``

    Of float32 and narrower from the Gram matrix of the shorter side in float64: as exact as a decomposition
    of the matrix in its own dtype.
    """
    if matrix.dtype == torch.float64:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return vh[:r] if right else u[:, :r]
    wide = matrix if right else matrix.T
    found = leading_eigenvectors(gram(wide), r)
    if wide.shape[0] < wide.shape[1]:
        found = F.normalize(wide.double().T @ found, dim=0)
    return (found.T if right else found).to(matrix.dtype)
