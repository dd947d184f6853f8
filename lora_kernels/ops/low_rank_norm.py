"""Row norms of an adapted weight that is never formed."""

from __future__ import annotations

from torch import Tensor

from . import _dispatch


def low_rank_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0) -> Tensor:
    """norm_n = ‖w_n + s b_n A‖₂, for each row n of the weight

    One pass over W: each tile of W + s B A lives in registers only. The expanded form
    ‖w_n‖² + 2s b_n (A w_n) + s² b_nᵀ (A Aᵀ) b_n reads W once as well, for A w_n, does as many operations
    and cancels where the update undoes the weight; so this is the sum of squares itself.

    Shapes: weight ``[N, K]`` of any strides, lora_a ``[r, K]``, lora_b ``[N, r]``; the norm is ``[N]``.
    Dtypes: floating; the norm is float64 for a float64 weight, else float32, and summed in it.
    Not differentiable: DoRA takes the norm as a constant (Liu et al., 2024, arXiv 2402.09353, section 4.3).

    Raises:
        ValueError: the shapes do not fit.
    """
    (out, cols), rank = weight.shape, lora_a.shape[0]
    if lora_a.shape != (rank, cols) or lora_b.shape != (out, rank):
        shapes = f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        raise ValueError(f"lora_a, lora_b: expected [r, {cols}] and [{out}, r], got {shapes}")
    tensors = (weight.detach(), lora_a.detach(), lora_b.detach())
    return _dispatch.call("low_rank_norm", *tensors, scaling)
