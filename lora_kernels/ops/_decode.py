"""When the CUDA decode kernels of ``csrc/cuda`` run: small batches that no gradient is wanted of."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _ops
from .._arguments import MultiAdd, MultiInputs

# Beyond these a batch is prefill: its rows reuse what they read, which Triton's tiles are for.
MAX_SLOTS, MAX_FUSED_ROWS = 512, 8
# Ranks of all adapters of a fused launch, of which each cluster computes h again.
MAX_FUSED_RANKS = 256


@functools.cache
def _card(device: torch.device) -> tuple[int, int]:
    """Shared memory that a thread block may have, in bytes, and the major compute capability."""
    properties = torch.cuda.get_device_properties(device)
    # torch's own stubs do not have the first.
    most = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return most, properties.major


def shared_bytes(rows: int, cols: int, ranks: int) -> int:
    """No less than what a thread block needs (``shared_layout`` of ``csrc/cuda/decode_index.h``)."""
    return 35_000 + rows * (cols // 4 + 800 + 6 * (ranks + 15))


def misfit(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the CUDA backend cannot compute ``op`` with ``args``, or ``None``."""
    if op not in _ops.CUDA_OPS:
        return f"it has kernels for {', '.join(_ops.CUDA_OPS)}, not {op}"
    if op == "multi_lora_linear_add":
        return _add_misfit(MultiAdd(*args))
    return _delta_misfit(MultiInputs(*args))


def _delta_misfit(inputs: MultiInputs) -> str | None:
    """Of ``multi_lora_linear``."""
    if inputs.keep_h or inputs.mask is not None or inputs.keep_scale is not None:
        return "its kernels are for inference: no dropout, no gradient of an adapter"
    x, a_pages, b_pages, pages, spans, coef, order, *_ = inputs
    return _batch_misfit(x, order, inputs.max_rank, (x, a_pages, b_pages), (coef,), (pages, spans))


def _add_misfit(inputs: MultiAdd) -> str | None:
    """Of ``multi_lora_linear_add``: what one linear does not fit, all go without."""
    if inputs.batch_invariant and _backend.active_backend() == "auto":
        return "a larger batch would get other kernels, with other bits"
    y, x, a_pages, b_pages, pages, spans, factors, weights, order, *_ = inputs
    factors = factors if weights is None else (*factors, weights)
    matrices, indices = (x, y, *a_pages, *b_pages), (*pages, *spans)
    return _batch_misfit(x, order, inputs.max_rank, matrices, factors, indices)


def _batch_misfit(
    x: Tensor,
    order: Tensor,
    max_rank: int,
    matrices: Sequence[Tensor],
    factors: Sequence[Tensor],
    indices: Sequence[Tensor],
) -> str | None:
    """What holds of any op: ``factors`` are scalings and weights, ``indices`` say which pages are whose."""
    reason = _backend.unavailable("cuda", x.device.type, x.dtype, max_rank)
    if reason is not None:
        return reason
    if order.shape[0] != x.shape[0] or order.shape[0] > MAX_SLOTS:
        return f"its kernels take up to {MAX_SLOTS} rows with one adapter each"
    for kind, dtype, tensors in (("scalings", torch.float32, factors), ("indices", torch.int32, indices)):
        for tensor in tensors:
            if tensor.dtype != dtype or not tensor.is_contiguous():
                form = "" if tensor.is_contiguous() else " with gaps"
                return f"its kernels take contiguous {dtype} {kind}, not {tensor.dtype}{form}"
    if shared_bytes(16, x.shape[1], max_rank) > _card(x.device)[0]:
        return f"{x.shape[1]} columns are more than its thread blocks can hold"
    return next(filter(None, (unreadable(matrix, x.dtype) for matrix in matrices)), None)


def unreadable(matrix: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot copy the rows of ``matrix`` sixteen bytes at a time, or ``None``."""
    if matrix.dtype != dtype:
        return f"its kernels take one dtype, not {matrix.dtype} with {dtype}"
    if matrix.shape[1] % 16 or matrix.stride(1) != 1 or matrix.stride(0) % 8 or matrix.data_ptr() % 16:
        return "its kernels take contiguous rows of a multiple of 16 columns"
    return None


def fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, layout: tuple[Any, ...]) -> Tensor | None:
    """x Wᵀ + b + the delta in one launch; ``None`` where that kernel does not fit.

    ``layout`` has the arguments of ``_ops.CUDA_FUSED`` from ``a_pages`` on.
    """
    if weight is None or x.device.type != "cuda" or _backend.active_backend() not in ("auto", "cuda"):
        return None
    *tensors, max_rank = layout
    if (
        any(t is not None and t.requires_grad for t in (x, weight, bias, *tensors))
        and torch.is_grad_enabled()
    ):
        return None
    a_pages, b_pages, pages, spans, scalings, weights, order, *_ = tensors
    rows = x.reshape(-1, x.shape[-1])
    adapters = min(rows.shape[0], spans.shape[0])
    if not 0 < rows.shape[0] <= MAX_FUSED_ROWS or adapters * max_rank > MAX_FUSED_RANKS:
        return None
    factors = (scalings,) if weights is None else (scalings, weights)
    matrices = (rows, weight, a_pages, b_pages)
    if _batch_misfit(rows, order, max_rank, matrices, factors, (pages, spans)) is not None:
        return None
    if _card(x.device)[1] < 9 or (bias is not None and not bias.is_contiguous()):
        return None
    y = torch.ops.lora_kernels.cuda_multi_lora_linear_fused.default(rows, weight, bias, *tensors, max_rank)
    return y.view(*x.shape[:-1], y.shape[-1])
